"""The front door's commands on corpora, training and measuring; `hybridlm.cli` puts them among the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli_options import (
    AdapterOption,
    CacheFormat,
    DataOption,
    JsonOption,
    ModelOption,
    Overrides,
    ProbeMethod,
    TokenizerOption,
    TrainingBackend,
    View,
)
from tokenizer.errors import UserError

if TYPE_CHECKING:
    from hybridlm.model import HybridLM
    from tokenizer.frames import Tokenizer
    from tokenizer.text import TextTokenizer
    from training.listening import Prompt
    from training.task import Sample


def prepare(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder of audio or of tar files, a JSONL manifest, or hf:NAME.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the tokens go.")],
    tokenizer: TokenizerOption = "box",
    workers: Annotated[int, typer.Option(metavar="N", help="Threads that decode.")] = 2,
    audio: Annotated[bool, typer.Option("--audio", help="Keep the audio itself, to train a tokenizer on.")] = False,
    sample_rate: Annotated[
        int, typer.Option(metavar="HZ", min=1000, help="Rate of the audio kept by --audio.")
    ] = 24_000,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only clips of this split, and those without one.")
    ] = None,
    trim_silence: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="Cut silence at clips' ends down to this: what ends in silence teaches a model to fall silent.",
        ),
    ] = None,
    format: Annotated[
        CacheFormat, typer.Option(help="Of tokens: rows, or tar files in WebDataset's layout, for object stores.")
    ] = CacheFormat.rows,
) -> None:
    """Turn a corpus into tokens on disk, to train a language model on."""
    from hybridlm.checkpoint import open_text
    from training.prepare import prepare as prepare_tokens
    from training.prepare import prepare_audio
    from training.processes import joined

    with joined() as processes:
        shared: dict[str, Any] = {"workers": workers, "split": split, "trim_silence_s": trim_silence}
        shared["processes"] = processes
        with processes.agreed():
            if audio and format is not CacheFormat.rows:
                raise UserError("--format tar is of tokens; leave it out with --audio")
            text = None if audio else open_text(tokenizer)
        if audio:
            prepare_audio(source, output, sample_rate_hz=sample_rate, **shared)
        else:
            prepare_tokens(source, output, tokenizer, text=text, layout=format.value, **shared)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A file of configs/, or your own.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output.")] = False,
) -> None:
    """Train a tokenizer or a language model."""
    from training.run import train as run

    run(config, overrides or [], resume=resume, sampler=_sound)


def _sound(model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer, prompts: Sequence[Prompt] = ()) -> list[Sample]:
    """What a model under training says and plays; only the front door knows both sampling and training."""
    from sampling.pipeline import AudioModel
    from training.task import Sample

    audio_model = AudioModel(model, tokenizer, text)
    seconds = min(4.0, model.config.max_frames / tokenizer.frame_rate_hz)
    requests: dict[str, dict[str, Any]] = {p.name: {"text": p.text, "tags": p.tags} for p in prompts}
    if not requests:
        requests = {"generated/speech": {"text": "Good morning."}}
        requests |= {f"generated/{tag}": {"tags": [tag]} for tag in ("music", "sound") if tag in text.tags}
    samples = []
    for name, request in requests.items():
        try:
            made = audio_model.generate(**request, duration=seconds)
        except UserError:  # a model that reads what it doesn't predict (spectra, finer codes) can't generate
            return []
        sample = Sample(name=name, waveform=made.row(0)[0], sample_rate_hz=made.sample_rate_hz)
        samples.append(sample)
    return samples


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of a language model's run.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="How many, each with a process.")] = 1,
    hours_of_audio: Annotated[
        float | None, typer.Option(metavar="H", help="Hours that the run is to hear, instead of its max_steps.")
    ] = None,
    backend: Annotated[TrainingBackend, typer.Option(help="How the GPUs share the model.")] = TrainingBackend.ddp,
    tflops: Annotated[
        float | None,
        typer.Option(metavar="T", help="TFLOP a second of a GPU; what a matrix product does here if not given."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of a GPU: says whether the run fits, and what would make it.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what a language model's run would take: parameters, memory a GPU, FLOP, hours. Nothing is allocated."""
    from training.plan_report import run

    run(
        config,
        overrides or [],
        gpus=gpus,
        backend=backend.value,
        hours_of_audio=hours_of_audio,
        tflops=tflops,
        memory_gib=memory,
        json_file=json_file,
    )


def finetune(
    data: DataOption,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the new model, or the adapter, goes.")],
    model: ModelOption = "box",
    lora: Annotated[bool, typer.Option("--lora", help="Train a small adapter, and leave the model as it is.")] = False,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Of the adapter's additions; 16 if not given.")] = None,
    old_data: Annotated[
        Path | None,
        typer.Option(
            metavar="MANIFEST", help="Recordings of what the model should not forget, scored before and after."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Continue a model's training on your own recordings, with or without transcripts."""
    from training.finetune import run

    run(model, data, output, overrides or [], lora=lora, rank=rank, old_data=old_data, sampler=_sound)


def merge(
    adapter: Annotated[str, typer.Option(metavar="DIR", help="An adapter that `finetune --lora` made.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the model goes.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="Its base, if not the one that the adapter names.")
    ] = None,
) -> None:
    """Write an adapter into its base's weights, as a model's folder of its own."""
    from hybridlm.merge import run

    run(adapter, output, model)


def doctor(
    data: DataOption,
    model: ModelOption = "box",
    adapter: AdapterOption = None,
    clips: Annotated[int, typer.Option(metavar="N", help="How many clips are decoded, drawn from all.")] = 200,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what is wrong with recordings, and with a model or adapter on them; exit status 1 if anything is broken."""
    from training.doctor import is_broken, run

    if is_broken(run(data, model, adapter, num_clips=clips, json_file=json_file, device=device, sampler=_sound)):
        raise typer.Exit(1)


def evaluate(
    data: DataOption,
    model: ModelOption = "box",
    adapter: AdapterOption = None,
    split: Annotated[str, typer.Option(help="Clips of this split, and those that name none.")] = "test",
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Score at most so many windows at once; by default 2000 frames.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    json_file: JsonOption = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw nats a frame by position in the clip and by codebook here, as a PNG."),
    ] = None,
) -> None:
    """Measure a model's likelihood of recordings: nats a frame, bits per second of audio, 95 % intervals."""
    from training.evaluate import run

    run(model, data, split, json_file, adapter=adapter, device=device, batch_size=batch_size, picture=picture)


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="configs/compare.yaml, or your own.")],
    overrides: Overrides = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", min=1, help="In place of the recipe's.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where runs and report go.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="STEM", help="The report elsewhere: STEM.md, STEM.json and STEM.png.")
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at a time.")] = 1,
    one: Annotated[
        str | None, typer.Option(metavar="DOMAIN/VARIANT/SEED", help="Make only this run, and no report.")
    ] = None,
) -> None:
    """Train variants on the same data and compare their likelihoods: a table, a figure, paired differences."""
    from training.compare import run

    raise typer.Exit(run(recipe, overrides or [], seeds=seeds, output=output, report=report, jobs=jobs, one=one))


def probe(
    data: DataOption,
    label: Annotated[str, typer.Option(metavar="KEY", help="The manifest's label to tell, such as emotion.")],
    tokenizer: TokenizerOption = "box",
    input: Annotated[
        View | None, typer.Option(help="What is probed; features where the tokenizer has them, else latents.")
    ] = None,
    method: Annotated[
        ProbeMethod | None,
        typer.Option(help="A linear layer or nearest neighbours as in X-ARES, or a logistic regression; all of them."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=VALUE", help="Only clips like this; may be repeated.")
    ] = None,
    folds: Annotated[
        str | None, typer.Option(metavar="KEY_OR_N", help="Cross-validate over a label's values or N random folds.")
    ] = None,
    leave_out: Annotated[
        str | None, typer.Option(metavar="KEY", help="Leave out one value of this label, such as speaker, at a time.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Only clips of this split, with --folds or --leave-out; without them train is learned, test scored."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the linear layer and of random folds.")] = 42,
    json_file: JsonOption = None,
) -> None:
    """Measure what a tokenizer's frames tell of recordings: accuracy beside a log-mel floor, 95 % intervals."""
    from training.probe import run

    run(
        tokenizer,
        data,
        {"label": label, "where": where, "folds": folds, "leave_out": leave_out, "split": split},
        input=None if input is None else input.value,
        method=None if method is None else method.value,
        device=device,
        seed=seed,
        json_file=json_file,
    )
