"""The front door: one subcommand a verb. It holds no logic; each command imports what it calls when it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlm.cli_options import AdapterOption, JsonOption, ModelOption, PrecisionOption, Source, TokenizerOption
from hybridlm.cli_training import compare, doctor, evaluate, finetune, merge, plan, prepare, probe, train
from tokenizer.errors import UserError

# Newer releases of typer carry their own copy of click: this names the base class of bad usage in either.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="hybridlm",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    text: Annotated[str | None, typer.Option(help="What to say, of any length.", callback=_check_text)] = None,
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="What to say, from a file of text.")] = None,
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
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="WAV or FLAC, a spectrogram PNG goes beside it; - for stdout.")
    ] = Path("output.wav"),
    stream: Annotated[bool, typer.Option("--stream", help="Write while it is made; long ones always are.")] = False,
    form: Annotated[
        str | None, typer.Option("--format", metavar="wav|pcm", help="Of stdout: WAV, or bare 16-bit samples.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Re-anchor when the sound is X band widths off its first seconds; inf: never.",
        ),
    ] = None,
    pause: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Least quiet between the sentences of a long text; 0.25 if not given."),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the drawn codes here (.safetensors), for 'hybridlm render'."),
    ] = None,
    precision: PrecisionOption = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile a frame's step first; pays on GPUs.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Make audio from text, from tags, from a recording to continue, or from nothing."""
    from sampling.files import run
    from tokenizer.loading import resolve_device

    run(
        model=model,
        adapter=adapter,
        text=text,
        text_file=text_file,
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
        stream=stream,
        form=form,
        max_drift=max_drift,
        pause=pause,
        save_plan=save_plan,
        precision=precision or "fp32",
        compile=compile,
        json_file=json_file,
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
    precision: PrecisionOption = None,
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
        precision=precision,
    )


@app.command()
def bench(
    model: ModelOption = "box",
    precision: PrecisionOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Also compile the step of one recording.")] = False,
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="Of audio a run.")] = 4.0,
    repeats: Annotated[int, typer.Option(metavar="N", help="Runs of each row.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is one if not given.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure how fast a model generates on this machine, and say what is on and what fell back."""
    from sampling.bench import run
    from tokenizer.loading import resolve_device

    run(
        model=model,
        precision=precision,
        compile=compile,
        duration=duration,
        repeats=repeats,
        device=str(resolve_device(device)),
        json_file=json_file,
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


for _command in (prepare, train, plan, finetune, merge, doctor, evaluate, compare, probe):
    app.command()(_command)


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
