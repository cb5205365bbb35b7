"""The GPU's side of the kernel bench, in a worker: ``python -m gpu.kernel_worker``.

A worker, since an error of a kernel leaves a CUDA context unusable: the bench then goes on in a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from duoserve.kernels.combine import moe_combine
from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.moe_gemv import moe_gemv_down, moe_gemv_up
from duoserve.kernels.route_sort import route_plan
from duoserve.kernels.weights import ExpertFormat, ExpertWeights
from gpu.attention_ops import attention_builders
from gpu.ceilings import gpu_facts, measure_ceilings
from gpu.decode_miss import Miss
from gpu.moe_operands import POOL_BYTES, Buffers, Pool, Step, bytes_of
from gpu.moe_paths import Check, against_truth, check_layer, layer, one_token_layer
from gpu.moe_peers import PeerWeights, peer_layer, peer_names
from gpu.moe_shapes import QWEN3, SHAPES, small
from gpu.op_cases import OpCase, Source
from gpu.small_ops import small_builders
from gpu.timing import Replay, Timed, captured, times_us
from harness import Summary, serve

OURS = "duoserve"
PEER_ROUNDINGS = 5  # of a peer's layer: it rounds gate and up, silu, their product, down and the weighted sum
QUICK_POOL, QUICK_SCALE, QUICK_CONTEXT = 4_000_000, 8, 4096

Row = dict[str, Any]


class WrongResult(Exception):
    """What was to be timed does not compute what it should; its time would mean nothing."""


class KernelBench:
    """Each method is one part of the bench: operands, a check, and times; ``quick`` shrinks the experts."""

    def __init__(self, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.device = device
        self._pool: Pool | None = None

    def close(self) -> None:
        """Nothing outlives the process."""

    def facts(self) -> dict[str, Any]:
        """The device."""
        return {"gpu": gpu_facts()}

    def ceilings(self, quick: bool) -> dict[str, Any]:
        """Rates of this device."""
        return measure_ceilings(QWEN3.expert_bytes("bf16"), QUICK_SCALE if quick else 1)

    def layer(self, model: str, format: str, tokens: int, quick: bool) -> dict[str, Any]:
        """A routed layer, each of its kernels, and the peers."""
        pool = self._pool_of(model, format, quick)
        steps = pool.steps(tokens, gpu_facts()["l2_bytes"])
        checks = check_layer(steps[0], pool)
        one_token = tokens == 1 and pool.weights.format is ExpertFormat.FLOAT  # what the matrix-vector kernels take
        if one_token:
            out_1H = one_token_layer(steps[0], pool.weights)
            checks.append(against_truth("one token", out_1H, steps[0], pool.weights, roundings=2))
        _must_pass(checks)
        path = one_token_layer if one_token else layer
        ours = Replay([lambda step=step: path(step, pool.weights) for step in steps])
        work = {"nbytes": bytes_of(steps, pool.expert_bytes), "flop": pool.shape.flop(tokens)}
        peers, failed = self._peers(pool, steps) if format == "bf16" else ({}, {})
        rows = [_row("layer", {OURS: ours} | peers, **work, failed=failed)]
        del ours, peers
        return {"rows": rows + self._kernels(pool, steps, one_token, work), "checks": _as_dicts(checks)}

    def indirection(self, model: str, format: str, tokens: int, quick: bool) -> dict[str, Any]:
        """The layer from slots in no order, and from two plain arrays in the experts' order."""
        pool = self._pool_of(model, format, quick)
        steps = pool.steps(tokens, gpu_facts()["l2_bytes"])
        plain, plain_slots_LE = pool.contiguous()
        plain_steps = [Step(s.x_TH, s.ids_TK, s.topk_weights_TK, plain_slots_LE[s.layer], s.layer) for s in steps]
        slotted, arrays = layer(steps[0], pool.weights), layer(plain_steps[0], plain)
        checks = [Check("slots change no bits", float(not torch.equal(slotted, arrays)), 0.0)]
        _must_pass(checks)
        ways: dict[str, Timed] = {
            OURS: Replay([lambda step=step: layer(step, pool.weights) for step in steps]),
            "contiguous weights": Replay([lambda step=step: layer(step, plain) for step in plain_steps]),
        }
        work = {"nbytes": bytes_of(steps, pool.expert_bytes), "flop": pool.shape.flop(tokens)}
        return {"rows": [_row("slot indirection", ways, **work)], "checks": _as_dicts(checks)}

    def miss(self, model: str, format: str, quick: bool) -> dict[str, Any]:
        """One missing expert of one token: read through, and copied before the launch by an engine or a kernel."""
        pool = self._pool_of(model, format, quick)
        miss = Miss(pool, pool.steps(1, gpu_facts()["l2_bytes"])[0])
        checks = miss.checks()
        _must_pass(checks)
        numbers = range(miss.count)
        ways: dict[str, Timed] = {
            OURS: captured([lambda n=n: miss.read_through(n) for n in numbers]),
            "copy, then launch": captured([lambda n=n: miss.copy_then_launch(n) for n in numbers]),
            "page_gather, then launch": captured([lambda n=n: miss.gather_then_launch(n) for n in numbers]),
        }
        row = _row("one decode miss", ways, link_bytes=pool.expert_bytes)
        self._pool = None  # its slots now hold other experts
        return {"rows": [row], "checks": _as_dicts(checks)}

    def attention(self, quick: bool) -> dict[str, Any]:
        """Decode attention, both kinds."""
        self._pool = None
        source = Source(self.device, gpu_facts()["l2_bytes"])
        return _ops(attention_builders(source, QUICK_CONTEXT if quick else 1 << 20))

    def small_ops(self, quick: bool) -> dict[str, Any]:
        """The small fused ops."""
        del quick
        return _ops(small_builders(Source(self.device, gpu_facts()["l2_bytes"])))

    def _pool_of(self, model: str, format: str, quick: bool) -> Pool:
        """The experts of one model, kept for the parts that follow."""
        shape = small(SHAPES[model]) if quick else SHAPES[model]
        if self._pool is None or (self._pool.shape, self._pool.format) != (shape, format):
            self._pool = None  # freed before the next is made
            self._pool = Pool(shape, format, self.device, QUICK_POOL if quick else POOL_BYTES)
        return self._pool

    def _peers(self, pool: Pool, steps: list[Step]) -> tuple[dict[str, Timed], dict[str, str]]:
        """The peers, ready to be timed, and why the others are not."""
        weights = [PeerWeights(pool, number) for number in range(len(pool.slots_LE))]
        ready, failed = {}, {}
        for name in peer_names(len(steps[0].x_TH)):
            try:
                runs = [peer_layer(name, step, weights[step.layer]) for step in steps]
                _must_pass([against_truth(name, runs[0](), steps[0], pool.weights, PEER_ROUNDINGS)])
                ready[name] = captured(runs)
            except ImportError:
                failed[name] = "not installed"
            except Exception as error:
                failed[name] = f"failed: {_first_line(error)}"
        return ready, failed

    def _kernels(self, pool: Pool, steps: list[Step], one_token: bool, work: dict[str, float]) -> list[Row]:
        """Each kernel of the layer by itself, on plans made beforehand."""
        weights, buffers = pool.weights, Buffers.of(steps[0], pool.shape)
        plans = [route_plan(step.ids_TK, step.slots_E) for step in steps]
        y_TKH = buffers.y_RH.view(*steps[0].ids_TK.shape, -1)
        pairs = list(zip(steps, plans, strict=True))
        two_thirds = {key: value * 2 / 3 for key, value in work.items()}
        one_third = {key: value / 3 for key, value in work.items()}
        up = [lambda s=s, p=p: moe_up(s.x_TH, weights, p, p.resident, buffers.act_RI) for s, p in pairs]
        down = [lambda p=p: moe_down(buffers.act_RI, weights, p, p.resident, buffers.y_RH) for p in plans]
        plan = [lambda s=s: route_plan(s.ids_TK, s.slots_E) for s in steps]
        combine = [lambda s=s: moe_combine(y_TKH, s.topk_weights_TK) for s in steps]
        rows = [
            _row("moe_up", {OURS: Replay(up)}, **two_thirds),
            _row("moe_down", {OURS: Replay(down)}, **one_third),
            _row("route_plan", {OURS: Replay(plan)}),
            _row("moe_combine", {OURS: Replay(combine)}),
        ]
        if one_token:
            rows += _one_token_kernels(weights, steps, buffers, two_thirds, one_third)
            gemms = Replay([lambda s=s: layer(s, weights) for s in steps])
            rows.append(_row("layer through the GEMMs", {OURS: gemms}, **work))
        return rows


def _one_token_kernels(
    weights: ExpertWeights, steps: list[Step], buffers: Buffers, up: dict[str, float], down: dict[str, float]
) -> list[Row]:
    """The matrix-vector pair by itself."""
    slots = [step.slots_E[step.ids_TK[0]] for step in steps]
    out_1H = torch.empty_like(steps[0].x_TH)
    pairs = list(zip(steps, slots, strict=True))
    act_KI = buffers.act_RI
    ups = [lambda s=s, k=k: moe_gemv_up(s.x_TH, weights, k, act_KI) for s, k in pairs]
    downs = [lambda s=s, k=k: moe_gemv_down(act_KI, weights, k, s.topk_weights_TK, None, out_1H) for s, k in pairs]
    return [_row("moe_gemv_up", {OURS: Replay(ups)}, **up), _row("moe_gemv_down", {OURS: Replay(downs)}, **down)]


def _ops(builders: Iterable[Callable[[], OpCase]]) -> dict[str, Any]:
    """Every case checked and timed; ``errors`` has those that failed, and the others go on."""
    rows, checks, errors = [], [], []
    for build in builders:
        name = str(getattr(build, "func", build))
        try:
            case = build()
            name = case.name
            checks.append(case.check())
            _must_pass(checks[-1:])
            contestants: dict[str, Timed] = {OURS: Replay(case.steps)}
            contestants |= {peer: captured(steps) for peer, steps in case.peers.items()}
            rows.append(_row(name, contestants, nbytes=case.nbytes))
        except Exception as error:
            errors.append(f"{name}: {_first_line(error)}")
    return {"rows": rows, "checks": _as_dicts(checks), "errors": errors}


def _row(
    what: str,
    contestants: dict[str, Timed],
    *,
    nbytes: float = 0,
    flop: float = 0,
    failed: dict[str, str] | None = None,
    **more: Any,
) -> Row:
    """Ours and the peers, timed in turn; ``ratio`` is the peer's time over ours, in pairs of rounds."""
    times = times_us(contestants)
    peers = {
        name: {
            "rounds_us": theirs,
            "us": asdict(Summary.of(theirs)),
            "ratio": asdict(Summary.of_pairs(theirs, times[OURS])),
            "graph": isinstance(contestants[name], Replay),
        }
        for name, theirs in times.items()
        if name != OURS
    }
    rounds = {"rounds_us": times[OURS], "us": asdict(Summary.of(times[OURS]))}
    return {"what": what, **rounds, "nbytes": nbytes, "flop": flop, "peers": peers, "failed": failed or {}} | more


def _must_pass(checks: Iterable[Check]) -> None:
    wrong = [check for check in checks if not check.passed]
    if wrong:
        raise WrongResult("; ".join(f"{c.name}: relative error {c.error:.2e}, limit {c.limit:.1e}" for c in wrong))


def _as_dicts(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [check.to_dict() for check in checks]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


if __name__ == "__main__":
    serve(KernelBench)
