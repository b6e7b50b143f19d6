"""Times models in turn; counts their parameters and multiply-adds; measures the memory that they take."""

import ctypes
import gc
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.discovery import describe
from backbones.errors import MissingDependency

from .cases import Case

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Rounds, however long they take: what a median needs.
FEWEST = 3


@dataclass(frozen=True)
class Result:
    """What was measured of one case; without figures, and with the reason, where it could not be."""

    name: str
    library: str
    column: str
    dtype: str
    size: str
    maps: str = ""
    params_m: float | None = None
    gmacs: float | None = None
    latency_ms: float | None = None
    least_ms: float | None = None
    rounds: int = 0
    images_s: float | None = None
    peak_mb: float | None = None
    error: str = ""


def measure(cases: Sequence[Case], seconds: float, rounds: int | None = None, memory: bool = True) -> list[Result]:
    """Times the cases in turn, so that whatever else the machine does falls on all of them alike.

    Args:
        cases: a failure of one harms none of the others.
        seconds: how long to time all of them together, warm-up aside; FEWEST rounds in any case.
        rounds: at most so many.
        memory: also measure peak memory, of models as built and for_inference, uncompiled.
    """
    results: list[Result] = []
    steps: dict[int, Callable[[], None]] = {}
    counted: dict[str, float] = {}
    for i, case in enumerate(cases):
        about: dict[str, Any] = {"name": case.name, "library": case.library, "column": case.column, "dtype": case.dtype}
        results.append(Result(**about, size="x".join(map(str, case.size))))
        same = f"{case.library} {case.name} {case.size} {case.options}"
        try:
            model, images = case.build()
            if same not in counted:
                counted[same] = round(_gmacs(case), 2)
            params = sum(p.numel() for p in model.parameters())
            facts: dict[str, Any] = {
                "maps": " ".join(map(str, case.strides(model))),
                "params_m": round(params / 1e6, 2),
            }
            step = _step(case, model, images)
            for _ in range(2):
                step()
        except Exception as error:  # whatever a model or a compiler raises
            results[i] = replace(results[i], error=describe(error))
            continue
        results[i], steps[i] = replace(results[i], **facts, gmacs=counted[same]), step
    for i, taken in _take_turns(steps, seconds, rounds).items():
        middle = statistics.median(taken)
        results[i] = replace(
            results[i],
            latency_ms=round(1e3 * middle, 1),
            least_ms=round(1e3 * min(taken), 1),
            rounds=len(taken),
            images_s=round(cases[i].batch / middle, 2),
        )
        if memory and cases[i].runtime == "torch" and not (cases[i].compile or cases[i].channels_last):
            try:
                results[i] = replace(results[i], peak_mb=round(_peak_memory(cases[i]), 1))
            except Exception as error:  # as above, in a process of its own
                results[i] = replace(results[i], error=f"peak memory: {describe(error)}")
    return results


def _take_turns(steps: dict[int, Callable[[], None]], seconds: float, rounds: int | None) -> dict[int, list[float]]:
    """Seconds of each step, in rounds through all of them, each round in another order."""
    times: dict[int, list[float]] = {i: [] for i in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    end, done = time.perf_counter() + seconds, 0
    while order and (done < FEWEST or (time.perf_counter() < end and done != rounds)):
        shuffle(order)  # what a model leaves in the caches does not always fall on the same one
        for i in order:
            start = time.perf_counter()
            steps[i]()
            times[i].append(time.perf_counter() - start)
        done += 1
    return times


def _step(case: Case, model: "nn.Module", images: "Tensor") -> Callable[[], None]:
    """One forward pass, or one forward and backward pass, that ends when the device has ended it."""
    import torch

    kind = torch.device(case.device).type
    run = _runner(case, model, images)

    def step() -> None:
        run()
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


def _runner(case: Case, model: "nn.Module", images: "Tensor") -> Callable[[], object]:
    import torch

    from backbones.compiling import compile_blocks

    if case.runtime != "torch":
        return _RUNTIMES[case.runtime](case, model, images)
    dtype = getattr(torch, case.dtype)
    if case.for_inference:
        model = case.faster(model)
        images = images if dtype == torch.float32 else images.to(dtype)
    else:
        layout = torch.channels_last if case.channels_last else torch.preserve_format
        kind = dtype if case.cast else torch.float32
        anything: Any = model  # torch's own types know no memory format beside a dtype
        model, images = anything.to(kind, memory_format=layout), images.to(kind, memory_format=layout)
    call: Any = model
    if case.compile and case.library == "ours" and not case.for_inference:
        compile_blocks(model)  # as `fit --model.compile true` does
    elif case.compile and not case.for_inference:
        call = torch.compile(model, dynamic=False)
    mixed = case.dtype != "float32" and not (case.for_inference or case.cast)
    autocast = torch.autocast(torch.device(case.device).type, dtype, enabled=mixed)

    def forward() -> None:
        with torch.inference_mode(), autocast:
            call(images)

    def forward_and_backward() -> None:
        with autocast:
            loss = sum(m.float().mean() for m in call(images))
        loss.backward()
        model.zero_grad(set_to_none=True)

    return forward_and_backward if case.train else forward


def _onnxruntime(case: Case, model: "nn.Module", images: "Tensor") -> Callable[[], object]:
    """onnxruntime with as many threads as PyTorch, on what torch.onnx makes of a model for this one size."""
    import contextlib
    import io
    import logging
    import tempfile

    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx exports with
    except ImportError as error:
        raise MissingDependency(f'{error}; run `pip install "dense-backbones[export]"`') from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # its threads leave the next column alone
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "model.onnx")
        torch.onnx.export(model, (images,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, inputs)


def _openvino(case: Case, model: "nn.Module", images: "Tensor") -> Callable[[], object]:
    """OpenVINO with as many threads as PyTorch, for this one size."""
    import torch

    try:
        import openvino
    except ImportError as error:
        raise MissingDependency(f"{error}; run `pip install openvino`") from error
    converted = openvino.convert_model(model, example_input=images, input=tuple(images.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    inputs = images.numpy()
    return lambda: request.infer(inputs)


_RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def _gmacs(case: Case) -> float:
    """Billions of multiply-adds in the forward pass of one image."""
    from backbones.counting import gmacs

    return gmacs(*replace(case, batch=1, train=False).build(case.counted_on))


def _peak_memory(case: Case) -> float:
    """Most memory, in MB, that a step takes beyond what the process held before the model was built."""
    import torch

    if torch.device(case.device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model, images = case.build()
        step = _step(case, model, images)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    import multiprocessing

    # A process of its own: what other models have allocated and given back would hide the peak.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_resident, (case,))


def _peak_resident(case: Case) -> float:
    import torch

    # What is imported and started along the way is no model's.
    case.build(case.counted_on)
    torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(30, 30))(torch.randn(1, 8, 32, 32)).sum().backward()
    before = _max_resident(reset=True)
    step = _step(case, *case.build())
    _max_resident(reset=True)  # what only building it takes, such as a checkpoint to be read, is not the step's
    step()
    step()
    return _max_resident() - before


def _max_resident(reset: bool = False) -> float:
    """Most memory, in MB, that this process has held, since it was last reset where the system can."""
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free already should not serve the model unseen
            Path("/proc/self/clear_refs").write_text("5")
        # Linux: unlike getrusage's figure, this one is not inherited from the parent process.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, AttributeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine(load: Case) -> str:
    """Where and under which load something was measured, in a line."""
    import torch

    if torch.device(load.device).type == "cuda":
        where = torch.cuda.get_device_name(load.device)
    else:
        threads = torch.get_num_threads()
        where = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"
    what = "forward and backward" if load.train else "forward of for_inference" if load.for_inference else "forward"
    size = " x ".join(map(str, load.size))
    return f"{where}, torch {torch.__version__}: {what}, {load.dtype}, batch {load.batch}, {size}"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "CPU"
