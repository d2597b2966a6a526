"""`quantize_model`: a bf16, fp16, fp32 or fp8-block checkpoint to an NVFP4 or MXFP4 one, matrix by matrix.

Memory beside the mapped source pages, which the system can drop at any time: one output shard, plus 9 bytes per element of the largest source
matrix (an expert's projection; 13 for fp8-block sources), plus the quantiser's fixed 160 MiB (320 MiB with four-over-six). safetensors 0.8 writes
the shard from where it lies; older versions may copy it once more. Calibration is another matter: it loads the whole source model.

The shards and their contents follow from the headers of the source and the options alone. So a run that was killed is repeated with the same
arguments, and writes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte import __version__
from halfbyte.arguments import as_device, check_name, check_type
from halfbyte.checkpoint.dialects import MODELOPT, STACKED_MODELOPT, Dialect, OutputName, fp8_scales_of, output_dialect
from halfbyte.checkpoint.json_files import read_json, text_of
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    check_destination,
    discard_unfinished,
    file_digest,
    plan_shards,
    shard_name,
)
from halfbyte.checkpoint.written_config import hf_quant_config, quantization_config
from halfbyte.convert.calibration import Calibration, calibrate
from halfbyte.convert.model_card import model_card
from halfbyte.convert.other_files import other_files
from halfbyte.convert.plan import Copied, Matrix, Plan, plan_conversion
from halfbyte.convert.report import QuantizeReport, Sqnr, sqnr_db
from halfbyte.device import Target
from halfbyte.env import expanded
from halfbyte.errors import CheckpointError, InputError
from halfbyte.formats import FORMATS, BlockFormat, QuantTensor, count_nonfinite, matrix_amax, nvfp4_decode_scale, quantize
from halfbyte.formats.e8m0 import ScaleRule

_CHANGED = "put the source back, remove the destination or give --restart, and repeat the command"


@dataclass(frozen=True)
class QuantizeOptions:
    """How to convert. `calibrate` names a text or JSONL file to measure input scales on; `skip` holds glob patterns of modules to leave alone.

    Raises:
        InputError: an option that is something else or of the other format, an output that cannot hold the format, or a shard size below 1.

    >>> QuantizeOptions(format="mxfp4").output
    'compressed-tensors'
    """

    format: Literal["nvfp4", "mxfp4"] = "nvfp4"
    output: OutputName | None = None  # modelopt for nvfp4, compressed-tensors for mxfp4
    four_over_six: bool = False
    scale_rule: ScaleRule = "ceil"
    all_linear: bool = False
    skip: tuple[str, ...] = ()
    calibrate: Path | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "cpu"

    def __post_init__(self) -> None:
        where = "QuantizeOptions"
        check_name("format", self.format, FORMATS, where)
        check_type(where, (tuple, list), skip=self.skip)  # a string would be read letter by letter
        for pattern in self.skip:
            check_type(where, str, pattern=pattern)
        if self.calibrate is not None:
            check_type(where, (str, os.PathLike), calibrate=self.calibrate)
            object.__setattr__(self, "calibrate", expanded(self.calibrate))
        check_type(where, int, max_shard_bytes=self.max_shard_bytes)
        if self.output is None:
            object.__setattr__(self, "output", "modelopt" if self.format == "nvfp4" else "compressed-tensors")
        output_dialect(str(self.output), self.block_format)
        if self.format == "mxfp4" and (self.four_over_six or self.calibrate):
            raise InputError("four-over-six and calibrated input scales belong to nvfp4", given=self.format, needed="nvfp4")
        if self.format == "nvfp4" and self.scale_rule != "ceil":
            raise InputError("a scale rule belongs to mxfp4", given=self.format, needed="mxfp4")
        if self.max_shard_bytes < 1:
            raise InputError("the shard size is below 1 byte", given=self.max_shard_bytes)

    @property
    def block_format(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def dialect(self) -> Dialect:
        """How the quantised modules are written."""
        return output_dialect(str(self.output), self.block_format)


def quantize_model(
    source: str | Path,
    destination: str | Path,
    options: QuantizeOptions | None = None,
    *,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    calibrating: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Quantise the checkpoint `source` into the new directory `destination`.

    Args:
        source: a directory or Hub name.
        destination: made when missing; must be empty or the unfinished result of an earlier run with the same source and options.
        options: see `QuantizeOptions`.
        restart: throw away the unfinished result of an earlier run first.
        dry_run: plan and report sizes; write nothing.
        progress: called with (bytes done, bytes in all) of the source after each tensor.
        calibrating: called with (tokens done, tokens in all) while calibration, which comes first, runs the model.

    Raises:
        CheckpointError: an unreadable source, non-finite weights, rows that do not divide into blocks, an occupied destination, a full disk.
        UnsupportedError: a source that is quantised already; calibration without transformers; a device that is not there.
        InputError: options that contradict each other or the model.

    >>> import tempfile
    >>> from pathlib import Path
    >>> demo = Path(halfbyte.__file__).parent / "demo_model"
    >>> report = quantize_model(demo, Path(tempfile.mkdtemp()) / "out", dry_run=True)
    >>> report.matrices, round(report.quantized_bytes / report.quantized_source_bytes, 3)
    (288, 0.281)
    """
    options = QuantizeOptions() if options is None else options
    check_type("quantize_model", QuantizeOptions, options=options)
    check_type("quantize_model", (str, os.PathLike), destination=destination)
    Target.of(as_device(options.device, "quantize_model"))  # before anything is made: raises where nothing can be computed
    checkpoint = Checkpoint.open(source)
    destination = expanded(destination)
    if destination.resolve().is_relative_to(checkpoint.path.resolve()):
        raise InputError("the destination lies in the source", given=str(destination), needed="another directory")
    if restart and not dry_run:
        discard_unfinished(destination)
    plan = plan_conversion(checkpoint, options.block_format, all_linear=options.all_linear, skip=options.skip)
    options = _fit_output(options, plan)
    job = _describe_job(checkpoint, options)
    check_destination(destination, job)
    sizes = [sum(_output_bytes(item, options).values()) for item in plan.items]
    shards = plan_shards(sizes, options.max_shard_bytes)
    report = QuantizeReport(
        source=str(source),
        destination=str(destination),
        format=options.format,
        output=str(options.output),
        source_bytes=plan.source_bytes,
        output_bytes=sum(sizes),
        quantized_source_bytes=sum(_source_bytes(checkpoint, item) for item in plan.matrices),
        quantized_bytes=sum(size for item, size in zip(plan.items, sizes, strict=True) if isinstance(item, Matrix)),
        matrices=len(plan.matrices),
        shards=len(shards),
        dry_run=dry_run,
    )
    copied = list(other_files(checkpoint.path))
    if dry_run:
        return report
    with CheckpointWriter(destination, job) as writer:
        calibration = _calibration(checkpoint, plan, options, writer, calibrating)
        _write_other_files(copied, plan, options, writer)
        _write(checkpoint, job["source"], plan, options, calibration, writer, shards, report, progress)
    return report


def _write(
    checkpoint: Checkpoint,
    source: dict[str, Any],
    plan: Plan,
    options: QuantizeOptions,
    calibration: Calibration | None,
    writer: CheckpointWriter,
    shards: Sequence[range],
    report: QuantizeReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Convert shard by shard, while the source is as `source` describes it; `report` learns what came of it."""
    if calibration is not None:
        report.never_routed, report.calibration_tokens = calibration.never_routed, calibration.tokens
    converter = _Converter(checkpoint, plan, options, calibration)
    weight_map: dict[str, str] = {}
    done = 0
    for index, shard in enumerate(shards):
        name = shard_name(index, len(shards))
        finished = writer.is_finished(name)
        tensors: dict[str, torch.Tensor] = {}
        sqnr: dict[str, Sqnr] = {}
        for item in plan.items[shard.start : shard.stop]:
            weight_map.update(dict.fromkeys(_output_bytes(item, options), name))
            if not finished:
                tensors.update(converter.convert(item, sqnr))
            done += _source_bytes(checkpoint, item)
            if progress:
                progress(done, plan.source_bytes)
        _check_unchanged(checkpoint, source)
        if not finished:
            writer.write_tensors(name, tensors, record={kind: asdict(value) for kind, value in sqnr.items()})
        report.resumed_shards += finished
        report.add_sqnr(writer.record_of(name))
    writer.write_text("README.md", model_card(report, _flags(options), text_of(checkpoint.path / "README.md")))
    _check_unchanged(checkpoint, source)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    block = quantization_config(options.dialect, plan.excluded, calibrated=calibration is not None)
    writer.finish(weight_map, report.output_bytes, config | {"quantization_config": block})


def _fit_output(options: QuantizeOptions, plan: Plan) -> QuantizeOptions:
    """The same options with the output "gpt-oss" where experts stay stacked, which no other output can hold.

    Raises:
        InputError: options that stacked experts do not go with, or the output "gpt-oss" without them.
    """
    if not plan.stacked:
        if options.output == "gpt-oss":
            raise InputError("the output gpt-oss is for stacked experts with biases", given="other experts", needed="modelopt or compressed-tensors")
        return options
    if options.calibrate is not None or any(matrix.source.stack is None for matrix in plan.matrices):
        raise InputError(
            "gpt-oss is quantised without calibration, its experts only", given="--calibrate or --all-linear", next_step="leave the option out"
        )
    return replace(options, output="gpt-oss")


class _Converter:
    """Turns one item of the plan into tensors of the result."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions, calibration: Calibration | None):
        self.checkpoint, self.options, self.calibration = checkpoint, options, calibration
        self.groups: dict[str, list[Matrix]] = {}
        for matrix in plan.matrices:
            self.groups.setdefault(matrix.group, []).append(matrix)
        # The members of a group follow one another in the plan, or nearly; a scale that has left this small cache is computed again.
        self.group_scale = lru_cache(maxsize=16)(self._group_scale)

    def convert(self, item: Matrix | Copied, sqnr: dict[str, Sqnr]) -> dict[str, torch.Tensor]:
        if isinstance(item, Copied):
            return {item.tensor: item.read(self.checkpoint).contiguous()}
        options = self.options
        weight = item.source.read(self.checkpoint).to(options.device)
        global_scale = self.group_scale(item.group)
        q = quantize(weight, options.block_format, global_scale, four_over_six=options.four_over_six, scale_rule=options.scale_rule)
        sqnr.setdefault(item.kind, Sqnr()).add(item.module, sqnr_db(weight, q))
        return options.dialect.pack(item.module, q.to("cpu"), self._input_scale(item))

    def _group_scale(self, group: str) -> torch.Tensor | None:
        """The common global scale of the group's matrices (None for MXFP4), after checking that they are finite."""
        amax = torch.zeros((), dtype=torch.float32, device=self.options.device)
        for matrix in self.groups[group]:
            weight = matrix.source.read(self.checkpoint).to(self.options.device)
            if count := count_nonfinite(weight):
                raise CheckpointError(
                    f"tensor {matrix.source.tensor} has {count} NaN or infinite weights",
                    where=str(self.checkpoint.file_of(matrix.source.tensor)),
                    given=f"module {matrix.module}",
                    needed="finite weights",
                    next_step="download the file again, or leave the module unquantised with --skip",
                )
            amax = torch.maximum(amax, matrix_amax(weight))
        if not self.options.block_format.has_global_scale:
            return None
        return self.options.dialect.storable_global_scale(nvfp4_decode_scale(amax, four_over_six=self.options.four_over_six))

    def _input_scale(self, matrix: Matrix) -> torch.Tensor | None:
        if self.calibration is None:
            return None
        return nvfp4_decode_scale(torch.tensor(self.calibration.amax[matrix.module], dtype=torch.float32))


def _calibration(
    checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions, writer: CheckpointWriter, progress: Callable[[int, int], None] | None
) -> Calibration | None:
    """Measure input scales, or take them from the journal of an earlier run: a second measurement on a GPU may differ in the last bit."""
    if options.calibrate is None:
        return None
    kept = writer.note("calibration")
    if kept is not None:
        return Calibration(**kept)
    calibration = calibrate(checkpoint.path, plan.matrices, options.calibrate, device=options.device, progress=progress)
    writer.keep_note("calibration", asdict(calibration))
    return calibration


def _write_other_files(files: Sequence[tuple[Path, str]], plan: Plan, options: QuantizeOptions, writer: CheckpointWriter) -> None:
    for file, name in files:
        writer.copy_file(file, name)
    if options.dialect in (MODELOPT, STACKED_MODELOPT):
        writer.write_json("hf_quant_config.json", hf_quant_config(plan.excluded, calibrated=options.calibrate is not None))


def _flags(options: QuantizeOptions) -> str:
    """The options of `halfbyte quantize` that say what these do, each after a blank."""
    switches = {"--four-over-six": options.four_over_six, "--all-linear": options.all_linear}
    values = {"--scale-rule": "" if options.scale_rule == "ceil" else options.scale_rule, "--calibrate": options.calibrate and options.calibrate.name}
    given = [f"--output {options.output}", *(name for name, is_on in switches.items() if is_on)]
    given += [f"{name} {value}" for name, value in values.items() if value] + [f"--skip '{pattern}'" for pattern in options.skip]
    return "".join(f" {flag}" for flag in given)


def _describe_job(checkpoint: Checkpoint, options: QuantizeOptions) -> dict[str, Any]:
    """What makes two runs the same job: source files, options that change the result, version."""
    values = {key: value for key, value in asdict(options).items() if key not in ("device", "calibrate")}
    if options.calibrate is not None:
        values["calibrate"] = _digest(options.calibrate)
    return {
        "halfbyte": __version__,
        "source": _describe_source(checkpoint),
        "options": values,
    }


def _describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Size and time of every weight file, and what config.json says."""
    files = sorted({checkpoint.file_of(name) for name in checkpoint.names})
    try:
        described: dict[str, Any] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError as error:
        raise CheckpointError("the source vanished", where=str(checkpoint.path), given=error, next_step=_CHANGED) from error
    config = json.dumps(read_json(checkpoint.path / "config.json"))
    return described | {"config.json": hashlib.sha256(config.encode()).hexdigest()}


def _check_unchanged(checkpoint: Checkpoint, source: dict[str, Any]) -> None:
    """Raise CheckpointError where the source is no longer what `_describe_source` said of it: the result would be a mixture."""
    now = _describe_source(checkpoint)
    changed = [name for name, facts in source.items() if now[name] != facts]
    if changed:
        raise CheckpointError("the source changed while it was read", where=str(checkpoint.path), given=", ".join(changed), next_step=_CHANGED)


def _digest(file: Path) -> str:
    if file.exists() and not file.is_file():  # a device may have no end
        raise CheckpointError("not a regular file", where=str(file), needed="a text or JSONL file to calibrate on")
    try:
        return file_digest(file)
    except OSError as error:
        raise CheckpointError("cannot read the calibration file", where=str(file), given=error) from error


def _source_bytes(checkpoint: Checkpoint, item: Matrix | Copied) -> int:
    """Bytes of an item in the source, fp8-block scales included."""
    if isinstance(item, Matrix):
        info = checkpoint.info(item.source.tensor)
        own = math.prod(item.source.shape) * info.dtype.itemsize
        tensor = item.source.tensor
    else:
        tensor = item.tensor
        own = checkpoint.info(tensor).nbytes
    scales = fp8_scales_of(tensor)
    return own + (checkpoint.info(scales).nbytes if scales in checkpoint else 0)


def _output_bytes(item: Matrix | Copied, options: QuantizeOptions) -> dict[str, int]:
    """Names and sizes of the tensors that an item becomes."""
    if isinstance(item, Copied):
        return {item.tensor: item.nbytes}
    sizes = _packed_bytes(item.source.shape, options.dialect, options.calibrate is not None)
    return {item.module + suffix: nbytes for suffix, nbytes in sizes.items()}


@cache
def _packed_bytes(shape: tuple[int, ...], dialect: Dialect, calibrated: bool) -> dict[str, int]:
    """The sizes, by suffix, of what `Dialect.pack` makes of matrices of this shape, without making it."""
    format = dialect.format
    assert format
    *rows, columns = shape
    scalar = torch.empty(shape[:-2], dtype=torch.float32, device="meta")
    codes = torch.empty(*rows, columns // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(*rows, columns // format.block, dtype=format.scale_dtype, device="meta")
    q = QuantTensor(codes, scales, scalar if format.has_global_scale else None, format)
    return {suffix: tensor.nbytes for suffix, tensor in dialect.pack("", q, scalar if calibrated else None).items()}
