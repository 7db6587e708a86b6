"""Maps of whole scenes: `spectralx.predict` is the command and the function.

- `tiles`: where tiles lie and how much each counts where they overlap;
- `bands`: which bands of a scene go into which input of a model;
- `scene`, `scaling`, `ahead`: reading by window, in a thread, and scaling on the device;
- `predictor`: a checkpoint, ready to predict;
- `blend`: logits of overlapping tiles, a band of rows at a time;
- `store`: what is finished, on disk, so that an ended run goes on;
- `output`, `quicklook`: the files people open;
- `job`: options, and what is to be done for a scene;
- `run`: one scene from start to end.
"""
