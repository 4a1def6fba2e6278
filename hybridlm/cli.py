"""The front door: one subcommand a verb. It holds no logic; each command imports what it calls when it is called."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenizer.errors import UserError

if TYPE_CHECKING:
    from hybridlm.model import HybridLM
    from tokenizer.frames import Tokenizer
    from tokenizer.text import TextTokenizer
    from training.task import Sample

# Newer releases of typer carry their own copy of click: this names the base class of bad usage in either.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="hybridlm",
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Source(str, Enum):
    """Which stream of a tokenizer the audio is decoded from."""

    codes = "codes"
    latents = "latents"


class View(str, Enum):
    """Which view of a tokenizer's frames is probed."""

    features = "features"
    latents = "latents"
    codes = "codes"


class ProbeMethod(str, Enum):
    """How a probe tells classes apart."""

    linear = "linear"
    knn = "knn"
    logistic = "logistic"


class TrainingBackend(str, Enum):
    """How the processes of a run share a model."""

    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp2 = "fsdp2"


ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME_OR_DIR", help="'box', a model's folder or a hub id.")
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help=(
            "'box', 'encodec', 'hf:' and a codec's hub id or folder, or a tokenizer's or model's folder; "
            "'log-mel:' before any adds mel slices as features."
        ),
    ),
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="FOLDER_OR_MANIFEST", help="A folder of audio, or a JSONL manifest.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="DIR", help="An adapter that `finetune --lora` made of this model."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here too.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings to change, such as optimizer.learning_rate=1e-4."),
]


def _show_version(wanted: bool) -> bool:
    if wanted:
        from hybridlm import __version__

        print(__version__)
        raise typer.Exit
    return wanted


def _check_text(text: str | None) -> str | None:
    if text and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise typer.BadParameter("it is not UTF-8; set the terminal's encoding to UTF-8")
    return text


@app.callback()
def front(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Hybrid continuous-discrete language models for speech, music and sound."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the recordings and their spectrograms go.")] = Path(
        "demo-output"
    ),
) -> None:
    """Make speech, music and sound with the model in the box, and continue a recording."""
    from sampling.demo import run

    run(output_dir)


@app.command()
def generate(
    model: ModelOption = "box",
    adapter: AdapterOption = None,
    text: Annotated[str | None, typer.Option(help="What to say.", callback=_check_text)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="What it should be; may be repeated.")] = None,
    audio: Annotated[Path | None, typer.Option(metavar="PROMPT", help="A recording to continue.")] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="AUDIO", help="A recording to sound like; it is not in the result.")
    ] = None,
    reference_text: Annotated[
        str | None, typer.Option(help="What is said in the reference, if you know.", callback=_check_text)
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds; for text, a limit.")] = None,
    num_samples: Annotated[int, typer.Option(help="How many.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same audio; drawn and printed if not given.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: safer; above: wilder.")] = None,
    latent_temperature: Annotated[
        float | None, typer.Option(help="Of the latents alone: it multiplies their variance.")
    ] = None,
    latent_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Draw latents by the model's flow head in N steps.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw codes from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw codes from the likeliest that add up to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw codes at least p times as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: codes of recent frames become unlikelier; 1 is off.")
    ] = None,
    repetition_window: Annotated[int | None, typer.Option(metavar="N", help="Frames that count as recent; 32.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance; 3 with a text.")] = None,
    stop_threshold: Annotated[
        float | None,
        typer.Option(metavar="P", help="Speech stops once its stop is this likely; drawn by chance if not given."),
    ] = None,
    min_duration: Annotated[float | None, typer.Option(metavar="SECONDS", help="Speech does not stop before.")] = None,
    loudness: Annotated[
        float | None,
        typer.Option(metavar="LUFS", help="Loudness of the result (BS.1770), true peak at most -1 dB; -16, say."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="WAV or FLAC; a spectrogram PNG goes beside it.")] = Path(
        "output.wav"
    ),
    save_plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the drawn codes here (.safetensors), for 'hybridlm render'."),
    ] = None,
) -> None:
    """Make audio from text, from tags, from a recording to continue, or from nothing."""
    from sampling.files import run
    from tokenizer.loading import resolve_device

    run(
        model=model,
        adapter=adapter,
        text=text,
        tags=tag or (),
        audio=audio,
        reference=reference,
        reference_text=reference_text,
        duration=duration,
        num_samples=num_samples,
        seed=seed,
        temperature=temperature,
        latent_temperature=latent_temperature,
        latent_steps=latent_steps,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_window=repetition_window,
        cfg=cfg,
        stop_threshold=stop_threshold,
        min_duration=min_duration,
        loudness=loudness,
        device=str(resolve_device(device)),
        output=output,
        save_plan=save_plan,
    )


@app.command()
def render(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What 'generate --save-plan' wrote.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="The model that drew it, if it has moved since.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the latents; the plan's own if not given. Of the span, with --edit.")
    ] = None,
    latent_temperature: Annotated[
        float | None, typer.Option(help="It multiplies the latents' variance; the plan's own if not given.")
    ] = None,
    latent_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Draw latents by the model's flow head in N steps.")
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(metavar="START:END", help="Draw only these seconds anew; 40 ms of cross-fade around them."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="WAV or FLAC; a spectrogram PNG goes beside it.")] = Path(
        "rendered.wav"
    ),
) -> None:
    """Make a plan's audio again: the same, with other latents of the same codes, or with a span drawn anew."""
    from sampling.render import run
    from tokenizer.loading import resolve_device

    run(
        plan=plan,
        model=model,
        seed=seed,
        latent_temperature=latent_temperature,
        latent_steps=latent_steps,
        edit=edit,
        device=str(resolve_device(device)),
        output=output,
    )


@app.command()
def reconstruct(
    input: Annotated[Path, typer.Argument(metavar="IN", help="A recording.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="WAV or FLAC.")],
    tokenizer: TokenizerOption = "box",
    source: Annotated[Source, typer.Option("--from", help="What to decode.")] = Source.latents,
    num_codebooks: Annotated[
        int | None, typer.Option(metavar="K", help="Only the first K codebooks (with --from codes).")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Send a recording through a tokenizer and back, and measure what was lost."""
    from sampling.reconstruct import run

    run(
        input=input,
        output=output,
        tokenizer=tokenizer,
        source=source.value,
        num_codebooks=num_codebooks,
        json_file=json_file,
    )


@app.command()
def enhance(
    input: Annotated[Path, typer.Argument(metavar="IN", help="A recording of noisy speech.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="WAV or FLAC.")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="An enhancer's folder; none is in the box.")] = None,
    phase: Annotated[
        str, typer.Option(metavar="noisy|decoded", help="Mask the recording, or hand out what the codec decodes.")
    ] = "noisy",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Take the noise out of a recording of speech."""
    from sampling.enhance import run

    run(input=input, output=output, model=model, phase=phase, device=device, json_file=json_file)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of audio, or a JSONL manifest.")],
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
) -> None:
    """Turn a corpus into tokens on disk, to train a language model on."""
    from training.prepare import prepare as prepare_tokens
    from training.prepare import prepare_audio

    if audio:
        prepare_audio(source, output, sample_rate_hz=sample_rate, workers=workers, split=split)
    else:
        prepare_tokens(source, output, tokenizer, workers=workers, split=split)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A file of configs/, or your own.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output.")] = False,
) -> None:
    """Train a tokenizer or a language model."""
    from training.run import train as run

    run(config, overrides or [], resume=resume, sampler=_sound)


def _sound(model: HybridLM, tokenizer: Tokenizer, text: TextTokenizer) -> list[Sample]:
    """What a model under training says and plays; only the front door knows both sampling and training."""
    from sampling.pipeline import AudioModel
    from training.task import Sample

    audio_model = AudioModel(model, tokenizer, text)
    seconds = min(4.0, model.config.max_frames / tokenizer.frame_rate_hz)
    requests: dict[str, dict[str, Any]] = {"speech": {"text": "Good morning."}}
    requests |= {tag: {"tags": [tag]} for tag in ("music", "sound") if tag in text.tags}
    samples = []
    for name, request in requests.items():
        try:
            made = audio_model.generate(**request, duration=seconds)
        except UserError:  # a model that reads what it doesn't predict (spectra, finer codes) can't generate
            return []
        sample = Sample(name=f"generated/{name}", waveform=made.row(0)[0], sample_rate_hz=made.sample_rate_hz)
        samples.append(sample)
    return samples


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def info(
    name_or_dir: Annotated[str, typer.Argument(metavar="NAME_OR_DIR", help="'box', a folder or a hub id.")] = "box",
    adapter: AdapterOption = None,
) -> None:
    """Show what a model's folder holds: size, configuration, tokenizer, tags, licences."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    from hybridlm.checkpoint import describe

    facts = describe(name_or_dir, adapter)
    card = facts.pop("card", "")
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    console = Console()
    console.print(table)
    console.print(Markdown(card))


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and status 2, without a traceback."""
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except (UserError, _UsageError) as error:
        status = _refuse(getattr(error, "format_message", error.__str__)())
    except OSError as error:
        name = f"{str(error.filename)!r}: " if error.filename else ""
        status = _refuse(f"{name}{error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> int:
    print(f"hybridlm: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
