"""The features that predictors compute from, the same in training and at run time.

T tokens, K top-k, E experts, D decays.
"""

from __future__ import annotations

import numpy as np

# Decays per token of counts of a request's choices: over the last few tokens, the passage, the request.
DECAYS = np.array([0.5, 0.85, 0.98], dtype=np.float32)
_PRIOR_TOKENS = 2.0  # an expert's general popularity weighs as much as this many tokens of the request
_LEAST = np.float32(1e-4)
_LARGEST = 8.0


def margins(scores_TE: np.ndarray, top_k: int) -> np.ndarray:
    """How far each score lies above the border between the ``top_k`` best of its row and the others, [T, E]."""
    sorted_TE = np.sort(scores_TE, axis=1)
    least = scores_TE.shape[1] - top_k  # the place of the lowest of the best scores, in ascending order
    border_T1 = (sorted_TE[:, max(0, least - 1), None] + sorted_TE[:, least, None]) / 2
    above_TE: np.ndarray = scores_TE - border_T1
    return above_TE


def scaled(margins_TE: np.ndarray, scale: float) -> np.ndarray:
    """Margins in units of ``scale``, their typical size at this layer; outliers are cut off."""
    return np.minimum(np.maximum(margins_TE / scale, -_LARGEST), _LARGEST)


def spread(ids_TK: np.ndarray, weights_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """The weight that each expert was chosen with, 0 for the others, [T, E]."""
    chosen_TE = np.zeros((len(ids_TK), num_experts), dtype=np.float32)
    chosen_TE[np.arange(len(ids_TK))[:, None], ids_TK] = weights_TK
    return chosen_TE


def log_affinity(chosen_TE: np.ndarray, affinity_EE: np.ndarray, prior_E: np.ndarray) -> np.ndarray:
    """Log of the chance that an expert follows the chosen ones, by their weights; ``prior_E`` keeps it above 0."""
    logs_TE: np.ndarray = np.log(chosen_TE @ affinity_EE + (0.01 * prior_E + _LEAST))
    return logs_TE


def log_rates(counts_TDE: np.ndarray, totals_TD1: np.ndarray, prior_E: np.ndarray) -> np.ndarray:
    """Log of how often the request chose each expert lately, from decayed counts of choices and tokens, [T, D, E]."""
    rates_TDE = (counts_TDE + _PRIOR_TOKENS * prior_E) / (totals_TD1 + _PRIOR_TOKENS)
    logs_TDE: np.ndarray = np.log(rates_TDE + _LEAST)
    return logs_TDE


def any_row(chances_TE: np.ndarray) -> np.ndarray:
    """The chance that at least one row chooses an expert, float32 [E], as if rows were independent."""
    joined_E: np.ndarray = chances_TE[0] if len(chances_TE) == 1 else 1 - np.prod(1 - chances_TE, axis=0)
    return joined_E
