"""The figures of any model on held-out data: `mmvit.evaluate`, and the command of that name."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from mmvit.errors import UserError, did_you_mean
from mmvit.evaluation.classifier_report import evaluate_classifier
from mmvit.evaluation.clip_report import evaluate_clip
from mmvit.evaluation.generator_report import evaluate_generator
from mmvit.evaluation.splits import files_of, find_split
from mmvit.evaluation.tokenizer_report import evaluate_image_tokenizer
from mmvit.files import check_writable
from mmvit.hub import find_model_folder, in_words, read_description
from mmvit.models.clip import CLIP
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.joint import Joint
from mmvit.models.registry import CLASSIFIERS, IMAGE_TOKENIZERS
from mmvit.sampling.grids import check_grid_file
from mmvit.streams.address import Address, place

Part = Literal["classifier", "generator"]
PARTS: dict[Part, Callable] = {"classifier": evaluate_classifier, "generator": evaluate_generator}
EVALUATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    **dict.fromkeys(CLASSIFIERS, evaluate_classifier),
    **dict.fromkeys(IMAGE_TOKENIZERS, evaluate_image_tokenizer),
    GeneratorTransformer.kind: evaluate_generator,
    CLIP.kind: evaluate_clip,
}


def evaluate(
    model: str | Path,
    data: str | Path | Address,
    split: str | None = None,
    *,
    part: Part | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measures a classifier, generator, image tokenizer, CLIP or joint model on a split of a data set.

        mmvit.evaluate("runs/emoji-demo", "data/emoji", captioned=32)["retrieval@1"]

    Args:
        model: a folder, a run (see `mmvit.hub.find_model_folder`) or a Hub repository.
        data: a folder of shards, or its address (`s3://bucket/photos`).
        split: by default the held-out split that the data have (`find_split`).
        part: of a joint model; by default both, as far as the data have classes and captions.
        out: an image to draw, beside which the figures are written; None writes nothing.
        options: those of the model's kind: see `evaluate_classifier`, `evaluate_generator`,
            `evaluate_image_tokenizer` and `evaluate_clip`.

    Returns:
        the figures by name; of a joint model those of each part, by its name.

    Raises:
        UserError: if there is no such model or split, or an option does not apply to the model.
    """
    folder, data = find_model_folder(model), place(data)
    split = find_split(data, split)
    kind = read_description(folder)["kind"]
    if kind == Joint.kind:
        parts = [part] if part else parts_in(data, split)
    elif part:
        raise UserError(f"--as {part} chooses a part of a joint model; {folder} holds {in_words(kind)}")
    elif kind not in EVALUATIONS:
        raise UserError(f"{folder} holds {in_words(kind)}, which mmvit evaluate cannot measure")
    evaluations = {name: PARTS[name] for name in parts} if kind == Joint.kind else {kind: EVALUATIONS[kind]}
    check_options(options, evaluations.values(), f"{folder} holds {in_words(kind)}")
    if out is not None:
        check_writable(out := Path(out), megabytes=5)
        check_grid_file(out)
    words = f"the {' and the '.join(parts)} of a joint model" if kind == Joint.kind else in_words(kind)
    print(f"evaluating {folder} ({words}) on {split} of {data}", flush=True)
    figures = {}
    for name, measure in evaluations.items():
        own = {option: value for option, value in options.items() if option in options_of(measure)}
        drawn = out.with_name(f"{out.stem}-{name}{out.suffix}") if out and len(evaluations) > 1 else out
        figures[name] = measure(Path(model), data, split, drawn, **own)
    return figures if kind == Joint.kind else figures[kind]


def parts_in(data: Path, split: str) -> list[Part]:
    """The parts of a joint model that a split can measure. Raises UserError if it has neither classes nor
    captions."""
    found = files_of(data, split)
    parts: dict[Part, bool] = {"classifier": "cls" in found, "generator": bool(found & {"txt", "json"})}
    if not any(parts.values()):
        raise UserError(f"samples of {split} in {data} have neither a class (cls) nor a caption (txt, json)")
    return [part for part, there in parts.items() if there]


def options_of(measure: Callable) -> list[str]:
    """The keyword options of an evaluation."""
    parameters = inspect.signature(measure).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def check_options(options: dict[str, Any], evaluations: Iterable[Callable], what: str) -> None:
    """Raises UserError for an option that applies to none of the evaluations."""
    known = [name for measure in evaluations for name in options_of(measure)]
    every = [name for measure in EVALUATIONS.values() for name in options_of(measure)]
    for name in options:
        option = f"--{name.replace('_', '-')}"
        if name not in every:
            raise UserError(f"unknown option {name}{did_you_mean(name, known)}")
        if name not in known:
            raise UserError(f"{option} does not apply: {what}")
