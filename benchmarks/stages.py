"""Both stages of training as the benchmarks run them: models, inputs, and the parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Draw, Tensors
from benchmarks.shapes import RECONSTRUCTION_STEPS, STEPS, WAVELENGTHS, StepShape
from benchmarks.variants import use_running_statistics, with_plain_decoder, with_plain_head
from benchmarks.watch import Watch
from spectralx.backbones.encoder import Embedded
from spectralx.decoder import UPerHead
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation


@dataclass(frozen=True)
class Stage:
    """What a step of a stage consists of.

    Attributes
    ----------
    shapes : from `benchmarks.shapes`.
    parts : in order; the last is the optimiser, which has no way back.
    model_of : the model of a shape, in training mode.
    input_set : what its loss takes.
    plain : of a model, that which runs on the reference operators, around the same tensors.
    loss : of a model, the function of an input set that is differentiated.
    watched : inside the block the tensors between the parts of the model note when they pass.
    """

    shapes: tuple[StepShape, ...]
    parts: tuple[str, ...]
    model_of: Callable[[Any, Draw], Any]
    input_set: Callable[[Any, Draw], Tensors]
    plain: Callable[[Any], Any]
    loss: Callable[[Any], Callable[..., Tensor]]
    watched: Callable[[Any, Watch], AbstractContextManager[None]]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as both stages run it, on what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a step timed in this dtype runs under autocast."""
    return dtype in (torch.bfloat16, torch.float16)


def _images(shape: StepShape, draw: Draw) -> Tensor:
    size = (shape.batch, shape.bands, shape.image_size, shape.image_size)
    return draw.normal(*size, scale=0.1) + draw.normal(*size[:2], 1, 1, scale=0.3, offset=0.5)


def reconstruction_of(shape: StepShape, draw: Draw) -> MaskedReconstruction:
    """The model of a step of stage 1, in training mode."""
    assert shape.family != "dinov3"
    model = MaskedReconstruction(
        shape.family,
        in_channels=shape.bands,
        wavelengths=WAVELENGTHS[shape.sensor],
        image_size=shape.image_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        adapted_blocks=shape.blocks,
    )
    draw.fill(model).train()
    return model


def masked_images(shape: StepShape, draw: Draw) -> Tensors:
    """Images and mask noise of a step of stage 1."""
    return _images(shape, draw), draw.uniform(shape.batch, (shape.image_size // 16) ** 2)


def reconstruction_loss(model: MaskedReconstruction) -> Callable[..., Tensor]:
    """The loss of images and mask noise."""

    def loss(images: Tensor, noise: Tensor) -> Tensor:
        found: Tensor = model(images, noise).loss
        return found

    return loss


def segmentation_of(shape: StepShape, draw: Draw) -> Segmentation:
    """The model of a step of stage 2, in training mode."""
    model = Segmentation(
        shape.family,
        shape.bands,
        shape.classes,
        WAVELENGTHS[shape.sensor],
        image_size=shape.image_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        feature_blocks=shape.blocks,
        adapted_blocks=shape.blocks,
        dropout=0.0,
    )
    draw.fill(model).train()
    set_statistics(model, shape.batch)
    return model


def set_statistics(model: nn.Module, batch: int) -> None:
    """Batch norm of the decoder as a step of `batch` images has it: one image has no statistics of
    the map pooled to one value, and UPerNet refuses it in training; its head then keeps to running
    ones."""
    if isinstance(model, Segmentation):
        assert isinstance(model.head, UPerHead)
        model.head.train(batch > 1)
        use_running_statistics(model.head)


def labelled_images(shape: StepShape, draw: Draw) -> Tensors:
    """Images and labels of a step of stage 2."""
    images = _images(shape, draw)
    labels = draw.integers(shape.classes, shape.batch, shape.image_size, shape.image_size)
    return images, labels


@contextmanager
def _replaced(
    methods: Sequence[tuple[nn.Module, str, Callable[..., Any]]], hooks: Sequence[Any]
) -> Iterator[None]:
    """Inside the block modules have other methods; afterwards the hooks are gone too."""
    for owner, name, function in methods:
        object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in methods:
            object.__delattr__(owner, name)
        for hook in hooks:
            hook.remove()


@contextmanager
def watched_reconstruction(model: MaskedReconstruction, watch: Watch) -> Iterator[None]:
    """The tensors between the parts of `model` note when they pass."""
    encode, decode, predict = model.encode, model.decode, model.predict

    def after_tokenizer(_module: object, _inputs: object, outputs: Embedded) -> Embedded:
        (tokens,) = watch.crossing([outputs.tokens], "tokenizer", "encoder")
        return Embedded(tokens, None, None)

    def watched_encode(images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        latent, mask, ids = encode(images, noise)
        return (*watch.crossing([latent], "encoder", "decoder"), mask, ids)

    def watched_decode(latent: Tensor, ids_restore: Tensor) -> Tensor:
        return watch.crossing([decode(latent, ids_restore)], "decoder", "head")[0]

    def watched_predict(tokens: Tensor) -> tuple[Tensor, ...]:
        return watch.crossing(predict(tokens), "head", "loss")

    hooks = [model.patch_embed.register_forward_hook(after_tokenizer)]
    replaced = (
        (model, "encode", watched_encode),
        (model, "decode", watched_decode),
        (model, "predict", watched_predict),
    )
    with _replaced(replaced, hooks):
        yield


@contextmanager
def watched_segmentation(model: Segmentation, watch: Watch) -> Iterator[None]:
    """The tensors between the parts of `model` note when they pass."""
    are, features = model.AreApt, model.features
    assert are is not None
    project_keys, refine = are.project_keys, are.refine

    def after_tokenizer(_module: object, _inputs: object, outputs: Sequence[Tensor]) -> Any:
        return watch.crossing(outputs, "tokenizer", "backbone")

    def watched_keys(spatial: Tensor, spectral: Tensor) -> Any:
        given = watch.crossing((spatial, spectral), "tokenizer", "refinement")
        return watch.crossing(project_keys(*given), "refinement", "backbone")

    def watched_refine(tokens: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        (tokens,) = watch.crossing([tokens], "backbone", "refinement")
        return watch.crossing([refine(tokens, keys)], "refinement", "backbone")[0]

    def watched_features(images: Tensor) -> Any:
        return watch.crossing(features(images), "backbone", "decoder")

    def after_decoder(_module: object, _inputs: object, logits: Tensor) -> Tensor:
        return watch.crossing([logits], "decoder", "loss")[0]

    hooks = (
        model.vit_backbone.patch_embed.register_forward_hook(after_tokenizer),
        model.register_forward_hook(after_decoder),
    )
    replaced = (
        (are, "project_keys", watched_keys),
        (are, "refine", watched_refine),
        (model, "features", watched_features),
    )
    with _replaced(replaced, hooks):
        yield


STAGES = {
    "stage1": Stage(
        shapes=RECONSTRUCTION_STEPS,
        parts=("tokenizer", "encoder", "decoder", "head", "loss", "optimizer"),
        model_of=reconstruction_of,
        input_set=masked_images,
        plain=with_plain_head,
        loss=reconstruction_loss,
        watched=watched_reconstruction,
    ),
    "stage2": Stage(
        shapes=STEPS,
        parts=("tokenizer", "backbone", "refinement", "decoder", "loss", "optimizer"),
        model_of=segmentation_of,
        input_set=labelled_images,
        plain=with_plain_decoder,
        loss=lambda model: model.loss,
        watched=watched_segmentation,
    ),
}
