"""The families' test cases: one table each."""

from __future__ import annotations

from tests.models.cases import deepseek, glm4_moe, gpt_oss, granite_moe, olmoe, qwen2_moe, qwen3_moe
from tests.models.cases.case import FamilyCases

FAMILIES: dict[str, FamilyCases] = {
    cases.model_type: cases
    for cases in (
        qwen3_moe.CASES,
        qwen2_moe.CASES,
        olmoe.CASES,
        deepseek.V2,
        deepseek.V3,
        glm4_moe.CASES,
        granite_moe.CASES,
        gpt_oss.CASES,
    )
}
