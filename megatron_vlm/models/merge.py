"""Visual feature rows put at their places among the token embeddings (DESIGN D5).

Placeholders carry a valid token id, and their embeddings are replaced out of place: the embedding table gets no
gradient from them, and the features, which are leaves of the pipeline, get theirs. Positions are local to this rank's
slice of the sequence, so nothing is gathered. Letters: n feature rows, b micro-batch rows, h hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LocalFeatures:
    """The feature rows of one micro-batch that this rank's slice of the sequence holds.

    Args:
        rows: [n, h], a leaf where the vision side trains.
        position: [n] index in this rank's slice of the sequence.
        row: [n] row of the micro-batch.
    """

    rows: Tensor
    position: Tensor
    row: Tensor


def merge_features(embeddings: Tensor, features: LocalFeatures) -> Tensor:
    """Embeddings [s_local, b, h] with the feature rows in their places; the input is left as it was.

    Features are rounded to the embeddings' dtype. The places are distinct.
    """
    assert features.rows.shape == (len(features.position), embeddings.shape[2]), (
        f"{tuple(features.rows.shape)} feature rows for {len(features.position)} places of {tuple(embeddings.shape)}"
    )
    return torch.index_put(embeddings, (features.position, features.row), features.rows.to(embeddings.dtype))
