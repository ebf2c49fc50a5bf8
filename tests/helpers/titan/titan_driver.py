"""Runs torchtitan's own training on a CPU, for test_torchtitan.py: python titan_driver.py JOBS.json RESULT

JOBS is a list of {"name", "program", "argv", "both_ranks"}: program is the module to run, torchtitan.train or another, and
both_ranks asks for the rows of two data-parallel ranks in one batch. RESULT.<rank>.json has for each name the losses and
gradient norms of its steps, the keys and a checksum of its state dict, what it learned of gamma and the classes of its
attention, or how it was refused. Several jobs share one process, whose imports take longer than they do; none can make the
mesh of another again.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks.titan_speed import fill_in_torch_cpu


@contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """What the next training does."""
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.trainer import Trainer

    record: dict[str, Any] = {"losses": [], "grad_norms": []}
    init, log, close = Trainer.__init__, MetricsProcessor.log, Trainer.close

    def init_for_gloo(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for part in self.model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):  # gloo has no ReduceOp.PREMUL_SUM
                    module.set_force_sum_reduction_for_comms(True)

    def log_and_record(
        self: Any, step: Any, global_avg_loss: float, global_max_loss: Any, grad_norm: float, extra_metrics: Any = None
    ):
        record["losses"].append(global_avg_loss)
        record["grad_norms"].append(grad_norm)
        log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)

    def close_and_record(self: Any) -> None:
        states = {key: value for part in self.model_parts for key, value in part.state_dict().items()}
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in states.items()}
        record["keys"] = sorted(whole)
        modules = [module for part in self.model_parts for module in part.modules()]
        record["attention"] = sorted({type(m.inner_attention).__name__ for m in modules if hasattr(m, "inner_attention")})
        record["gamma_shift"] = [value.tolist() for key, value in sorted(whole.items()) if key.endswith("gamma_shift")]
        record["checksum"] = sum(x.double().abs().sum().item() for x in whole.values())
        close(self)

    Trainer.__init__, MetricsProcessor.log, Trainer.close = init_for_gloo, log_and_record, close_and_record
    try:
        yield record
    finally:
        Trainer.__init__, MetricsProcessor.log, Trainer.close = init, log, close


@contextmanager
def rows_of_both_ranks() -> Iterator[None]:
    """One process reads in turn a row of the first and of the second of two data-parallel ranks."""
    from torchtitan.hf_datasets import text_datasets

    real = text_datasets.HuggingFaceTextDataset

    class Both(real):
        def __init__(self, *args: Any, dp_rank: int, dp_world_size: int, **kwargs: Any) -> None:
            super().__init__(*args, dp_rank=0, dp_world_size=2, **kwargs)
            self.other = real(*args, dp_rank=1, dp_world_size=2, **kwargs)

        def __iter__(self) -> Any:
            for rows in zip(super().__iter__(), iter(self.other), strict=True):
                yield from rows

    text_datasets.HuggingFaceTextDataset = Both
    try:
        yield
    finally:
        text_datasets.HuggingFaceTextDataset = real


def main(jobs_file: str, result: str) -> None:
    fill_in_torch_cpu()  # before torchtitan is imported
    results: dict[str, Any] = {}
    for i, job in enumerate(json.loads(Path(jobs_file).read_text())):
        os.environ["MASTER_PORT"] = str(int(os.environ["FIRST_PORT"]) + i)
        sys.argv = [job["program"], *job["argv"]]
        errors = io.StringIO()
        try:
            rows = rows_of_both_ranks() if job["both_ranks"] else contextlib.nullcontext()
            with recorded() as record, rows, contextlib.redirect_stderr(errors):
                record.update(importlib.import_module(job["program"]).main() or {})
        except SystemExit as stop:
            record = {"exit": stop.code, "refusal": errors.getvalue().splitlines()[-1]}
        finally:
            sys.stderr.write(errors.getvalue())
        results[job["name"]] = record
        Path(f"{result}.{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
