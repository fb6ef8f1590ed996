"""Cost of encoding an image on this machine: a and b of a*patches + b*patches^2, measured (DESIGN D3).

The tower and the projector encode blank images of a few sizes, some at a time, forward only (a backward pass costs
about twice as much in both terms), and the fastest of some repetitions counts. Rank 0 measures, alone, and tells the
others: ranks with coefficients of their own would make different plans, and hang.

A tower that takes one size only is measured there, and b is 0: then all images cost the same, and so does any
cost they could be given. Where plans shall be the same in every run, `model.vision.cost` gives the coefficients.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_vlm.models.projectors.base import OpsProjector
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import count_patches, patch_grid
from megatron_vlm.parallel.media_plan import MediaCost
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.logging import get_logger

SIZES = (0.5, 1.0, 1.5)  # sides measured, in the tower's own
IMAGES = 4  # of one call
REPETITIONS = 3
LONG_SECONDS = 0.5  # of all runs of a size: what takes longer is told well enough by fewer
RESIZES = "interpolate_pos_encoding"  # the argument by which transformers' towers take other sizes than their own

logger = get_logger(__name__)


def set_measured_cost(encoder: VisionEncoder, world: torch.distributed.ProcessGroup) -> None:
    """Measures on rank 0 and has the encoder's media spec say so on every rank. A collective call."""
    cost = broadcast_object(measure_encoder(encoder) if world.rank() == 0 else None, world)
    survey = encoder.tower.survey
    encoder.tower.survey = replace(survey, media_spec=replace(survey.media_spec, cost=cost))
    patches = survey.media_spec.num_patches
    logger.info(
        "encoding an image of %d patches takes %.3g ms on rank 0 (a = %.3g, b = %.3g s per patch and its square); "
        "model.vision.cost fixes them",
        patches, 1e3 * cost.of(patches), cost.linear, cost.quadratic,
    )  # fmt: skip


def measure_encoder(encoder: VisionEncoder) -> MediaCost:
    """Coefficients in seconds. The encoder's mode is left as it was."""
    survey, was_training = encoder.tower.survey, encoder.training
    device = next(encoder.parameters()).device
    resizes = RESIZES in inspect.signature(encoder.tower.model.forward).parameters
    encoder.eval()
    points = []
    for scale in SIZES if resizes else (1.0,):
        height, width = (round(scale * side) for side in (survey.media_spec.height, survey.media_spec.width))
        if not count_patches(survey.hf_config, height, width):
            continue  # half of a tower's only patch
        pixels = torch.zeros(IMAGES, 3, height, width, device=device)
        seconds = fastest_seconds(partial(encode_images, encoder, pixels, resizes), device)
        points.append((count_patches(survey.hf_config, height, width), seconds / IMAGES))
    encoder.train(was_training)
    return fit_cost(points)


@torch.no_grad()
def encode_images(encoder: VisionEncoder, pixels: torch.Tensor, resizes: bool) -> torch.Tensor:
    """pixels [n, 3, H, W] -> [n, tokens, h]. `resizes`: the tower takes images of any size."""
    survey, model = encoder.tower.survey, encoder.tower.model
    options = {RESIZES: True} if resizes else {}
    pixels = pixels.to(next(model.parameters()).dtype)
    states = model(pixel_values=pixels, output_hidden_states=True, return_dict=True, **options).hidden_states
    features = states[survey.selected][:, survey.num_dropped_tokens :]
    projector = encoder.projector
    if not isinstance(projector, OpsProjector):
        return projector(features)
    own, projector.grid = projector.grid, patch_grid(survey.hf_config, pixels.shape[2], pixels.shape[3])
    try:
        return projector(features)
    finally:
        projector.grid = own


def fastest_seconds(
    work: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS, warm: bool = True
) -> float:
    """Fastest of several runs, fewer of long ones: processor time on the CPU, else until the device is done. `warm`:
    after one that does not count."""
    if warm:
        work()
    times: list[float] = []
    while len(times) < repetitions and sum(times) < LONG_SECONDS:
        times.append(_seconds(work, device))
    return min(times)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def fit_cost(points: Sequence[tuple[int, float]]) -> MediaCost:
    """a, b >= 0 that make the sum of ((a*p + b*p^2 - t) / t)^2 least over points (patches p, seconds t > 0).

    In x = p/t and y = p^2/t this is a*x + b*y = 1; where one coefficient would be negative, it is 0 and the other alone
    is fitted.
    """
    floor = 1e-9  # a clock too coarse for a tiny tower
    x = torch.tensor([p / max(t, floor) for p, t in points], dtype=torch.float64)
    y = torch.tensor([p * p / max(t, floor) for p, t in points], dtype=torch.float64)
    xx, xy, yy, sum_x, sum_y = (float(value) for value in (x @ x, x @ y, y @ y, x.sum(), y.sum()))
    determinant = xx * yy - xy * xy
    if len({p for p, _ in points}) == 1 or determinant <= 0:
        return MediaCost(sum_x / xx, 0.0)
    linear = (yy * sum_x - xy * sum_y) / determinant
    quadratic = (xx * sum_y - xy * sum_x) / determinant
    if quadratic < 0:
        return MediaCost(sum_x / xx, 0.0)
    return MediaCost(linear, quadratic) if linear >= 0 else MediaCost(0.0, sum_y / yy)
