"""Run in a process of its own, for the tests' type checking can't be compiled: prints what a compiled step makes."""

from __future__ import annotations

import shutil

import hybridlm.compiling
from hybridlm.compiling import _trial, compile_step, drop
from hybridlm.precision import pack
from tests.support.tiny_frames import VARIANTS, tiny_model

if __name__ == "__main__":
    model = tiny_model(**VARIANTS["reader-alone"])
    pack(model, "fp32")
    expected, _ = _trial(model, 2)
    times = iter([3.0, 2.0, 1.0])  # compiled steps count as faster, which tiny ones are not
    hybridlm.compiling._trial = lambda *given: (_trial(*given)[0], next(times))  # type: ignore[assignment]
    print(compile_step(model, 2, backend="inductor" if shutil.which("g++") else "aot_eager"))
    found, _ = _trial(model, 2)
    print(float((found - expected).abs().max()), float(expected.abs().max()))
    drop(model)
