"""The parts of ``make harden``: the page's rows, what each asks for, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A row of the page.

    Parameters
    ----------
    row : its number in docs/RELIABILITY.md.
    title, figure : what is tried, and what is asked of it.
    count : samples that the figure asks for.
    module : of this package, with ``run(numbers) -> Outcome``; "" for what needs a GPU, which
        `command` runs.
    quick : samples that ``make test`` runs; 0 for parts that CI leaves out.
    whole : whether the samples are one run that cannot be cut into slices.
    """

    row: int
    title: str
    figure: str
    count: int
    module: str = ""
    quick: int = 0
    whole: bool = False
    command: str = ""


PARTS: dict[str, Part] = {
    "contract": Part(
        1,
        "`torch.library.opcheck`, forward and backward operators: drawn shapes (0, 1, odd), "
        "strides and dtypes, every CPU backend",
        "2,000 samples, 0 failures",
        2000,
        "contract",
        5,
    ),
    "gradients": Part(
        2, "`gradcheck` in float64", "2,000 samples, 0 failures", 2000, "gradients", 48
    ),
    "accuracy": Part(
        3,
        "error against float64 relative to the reference's own",
        "5,000 cases, forward <= 2x, backward <= 3x plus round-off",
        5000,
        "accuracy",
        27,
    ),
    "routing": Part(
        4,
        "edges of routing: ties, infinities, NaN, 1e4, k = E, an expert without tokens",
        "500 cases: same choices on every backend, finite in finite out, no NaN hidden",
        500,
        "routing",
        18,
    ),
    "refusals": Part(
        5,
        "bad arguments of operators: dtype, device, shape, option, index",
        "500: the error names the argument; tensors, parameters, random states untouched",
        500,
        "refusals",
        81,
    ),
    "commands": Part(
        6,
        "bad configurations, lists, command lines, YAML tags, `..`, absolute and linked paths, "
        "`/vsi` paths, URLs",
        "300: exit status 2, one line, nothing written outside the output folder",
        300,
        "commands",
        12,
    ),
    "kills": Part(
        7,
        "SIGKILL at random times, at least 50 while saving; both stages; 0 and 2 workers",
        "200 kills, 0 unloadable, 200 bitwise-equal finishes",
        200,
        "kills",
    ),
    "faults": Part(
        8,
        "SIGTERM, full disk, killed worker",
        "20 each; old checkpoint whole; error within 10 s",
        60,
        "faults",
    ),
    "tiles": Part(
        9,
        "corrupt tiles: 500 truncated, 500 with a bit flipped, a VRT posing as TIFF, a bomb",
        "every truncation found, every flip found with a manifest, GTiff only, sizes capped, "
        "file named; skipped only if asked, and counted",
        1002,
        "tiles",
        22,
    ),
    "checkpoints": Part(
        10,
        "hostile checkpoints: pickle gadgets, sparse and huge tensors, wrong shapes, mutations of "
        "safetensors and .pth",
        "60 gadgets, 20 sizes, 10,000 mutations: no code run, no crash, memory <= twice the file + "
        "200 MB",
        10080,
        "checkpoints",
        90,
    ),
    "sanitizers": Part(
        11,
        "C++ built with AddressSanitizer and UndefinedBehaviorSanitizer: samples of rows 1, 4, 5",
        "clean; a planted overflow is caught",
        500,
        "sanitizers",
    ),
    "poison": Part(
        12,
        "uninitialised memory (poisoned allocations): calls of rows 1 and 4",
        "500 calls, the same bits",
        500,
        "poison",
        10,
    ),
    "gates": Part(
        13,
        "every Triton kernel compiled for sm_80, sm_90, sm_100; every CUDA file for sm_80, sm_90a",
        "all, shared memory within limits, no spills at the paper's shapes",
        2,
        "gates",
    ),
    "steps": Part(
        14,
        "training steps of a tiny model",
        "10,000 steps: memory slope <= 1 KB a step after step 1,000, open files flat",
        10000,
        "steps",
        whole=True,
    ),
    "determinism": Part(
        15,
        "determinism: forward, backward, training",
        "100 runs and 5 processes bitwise equal",
        100,
        "determinism",
    ),
    "mutations": Part(
        16,
        "planted faults across kernels and model, against the tests",
        "40 faults, at least 38 caught; the others gain a test",
        40,
        "mutations",
    ),
    "supply": Part(
        17,
        "supply chain: hash-locked requirements, known advisories, unsafe loading",
        "every pin hashed; no known advisory; no unsafe `torch.load`, pickle, eval, `yaml.load`",
        1,
        "supply",
        1,
    ),
    "gpu": Part(
        18,
        "on a GPU: memcheck, racecheck, initcheck, synccheck of every operator",
        "0 errors after each tool has found a planted fault",
        5,
        command="make gpu PART=sanitize",
    ),
    "gpu-numerics": Part(
        18,
        "on a GPU: rows 3, 4, 14, 15 in float32, TF32, bfloat16, float16",
        "0 failures; the same bits in 100 runs, level device memory in 10,000 steps",
        10100,
        command="make gpu PART=numerics",
    ),
}
