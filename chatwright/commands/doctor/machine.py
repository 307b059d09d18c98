"""`chatwright doctor`'s checks of this machine for a model: precision, kernels for each dtype, memory."""

from __future__ import annotations

from collections.abc import Iterator

from chatwright import memory, runtime
from chatwright.commands.doctor.finding import Finding
from chatwright.config import UserError
from chatwright.generate.shapes import unsupported
from chatwright.language_model import DTYPES, WORTH_COMPILING
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.serve.footprint import serving

NAMED = tuple(name for name in DTYPES if name != "auto")
VECTORS = "vector code that LLVM makes for this processor"


def check_machine(model: GPT) -> Iterator[Finding]:
    """Findings about the machine: precision of training, each dtype, memory for serving and for training."""
    kind = runtime.device().type
    if runtime.has_bf16():
        yield Finding("ok", "precision", f"{kind} computes bf16: training uses it")
    else:
        yield Finding("ok", "precision", f"{kind} has no bf16 units: training computes in float32")
    yield from _dtypes(model.config)
    yield _serving(model.config, model.parameter_count())
    yield _training(model.parameter_count())


def _dtypes(config: GPTConfig) -> Iterator[Finding]:
    """Which code computes with each dtype of the weights (`--dtype`), or why the dtype is not available."""
    kind = runtime.device().type
    if kind != "cpu":
        for name in NAMED:
            yield _on_gpu(name, kind)
        return
    reason = unsupported(config)
    if reason:
        remedy = "leave --dtype at auto: torch computes this shape, in float32"
        for name in NAMED:
            yield Finding(
                "warning", f"dtype {name}", f"the CPU kernels cannot run a model with {reason}", remedy
            )
        return
    from chatwright.generate.kernels import paths

    try:
        path = paths.choose()
    except UserError as error:
        for name in NAMED:
            yield Finding(
                "problem",
                f"dtype {name}",
                str(error),
                "unset CHATWRIGHT_KERNELS: the best one is chosen then",
            )
        return
    for name in NAMED:
        if name in ("fp32", "bf16"):
            yield Finding(
                "ok", f"dtype {name}", f"{VECTORS}; {'float32' if name == 'fp32' else 'bf16'} weights"
            )
        elif path == "plain":
            better = paths.possible()[-1]
            remedy = (
                f"unset CHATWRIGHT_KERNELS: there is {better}"
                if better != "plain"
                else "--dtype bf16 is likely faster here"
            )
            yield Finding(
                "warning", f"dtype {name}", "computed without instructions for small integers", remedy
            )
        else:
            yield Finding(
                "ok",
                f"dtype {name}",
                f"{paths.named(path)}, of {', '.join(paths.possible())} on this processor",
            )


def _on_gpu(name: str, kind: str) -> Finding:
    if name in ("int8", "int4"):
        return Finding(
            "warning",
            f"dtype {name}",
            f"the kernels for {name} are for CPUs, and this is {kind}",
            "take --dtype bf16 or fp32, or set CHATWRIGHT_DEVICE=cpu",
        )
    if name == "bf16" and not runtime.has_bf16():
        return Finding("warning", "dtype bf16", f"{kind} only imitates bf16", "take --dtype fp32")
    return Finding("ok", f"dtype {name}", f"torch on {kind}")


def _serving(config: GPTConfig, count: int) -> Finding:
    """Memory for serving in each available dtype, compared with the machine's."""
    on_cpu = runtime.device().type == "cpu"
    kernels = on_cpu and unsupported(config) is None
    names = NAMED if kernels else ("fp32",) if on_cpu else ("fp32", "bf16")
    plans = {name: serving(config, count, name, kernels=kernels) for name in names}
    if kernels and count < WORTH_COMPILING:
        plans = {"auto": serving(config, count, "fp32", kernels=False), **plans}
    first = next(iter(plans.values()))
    each = ", ".join(f"{name} {gigabytes(plan.total)}" for name, plan in plans.items())
    copies = " and their packed copy" if first.packed or len(plans) > 2 else ""
    text = f"{each}: parameters{copies}, up to {gigabytes(first.cache)} of keys and values"
    have = memory.total_memory_bytes()
    if have is None:
        return Finding("ok", "serving", f"{text}; how much there is, this system does not say")
    text += f"; there is {gigabytes(have)}"
    fitting = [name for name, plan in plans.items() if plan.total <= have]
    if not fitting:
        return Finding("problem", "serving", text, "use a machine with more memory, or a smaller model")
    if len(fitting) < len(plans):
        return Finding(
            "warning",
            "serving",
            text,
            f"serve it with --dtype {fitting[-1]}; these fit: {', '.join(fitting)}",
        )
    return Finding("ok", "serving", text)


def _training(count: int) -> Finding:
    """Memory for training all parameters (16 bytes each), compared with the machine's."""
    need = 16 * count
    text = f"{gigabytes(need)} (weights, gradients, two moments) and activations"
    have = memory.total_memory_bytes()
    if have is None:
        return Finding("ok", "training", f"{text}; how much there is, this system does not say")
    text += f"; there is {gigabytes(have)}"
    if need > 0.9 * have:
        return Finding(
            "warning",
            "training",
            text,
            "it cannot be trained here as a whole: use more memory, or a smaller model",
        )
    return Finding("ok", "training", text)


def gigabytes(count: float) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
