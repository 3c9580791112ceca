"""Trains one core for two tasks, classifier and generator, from shards of pictures with classes and shards
of captions with codes. The result classifies, draws captions and names pictures.

    python pipelines/train_joint.py configs/emoji_joint.toml
    python pipelines/evaluate.py runs/emoji-joint data/emoji --split combinations --out joint.png
    python pipelines/evaluate.py runs/emoji-joint data/emoji-groups --split test --as classifier

Every batch has `train.batch_size` pictures with classes and as many with captions. The run folder holds one
model with both tokenizers (best/, by the weighted sum of both held-out losses, and last/), of which
`mmvit.Generator.from_pretrained` and `Classifier.from_pretrained` read what is theirs. The same command with
--resume continues.
"""

from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.paired import PairedStream
from mmvit.data.samples import ClassifierSample, check_classes
from mmvit.data.shards import ShardPatterns
from mmvit.errors import UserError, run_script
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.evaluation.image_classifier import CLASSES
from mmvit.evaluation.likelihood import generator_loss
from mmvit.hub import write_json
from mmvit.models.joint import Joint, JointConfig
from mmvit.sampling.generator import Generator
from mmvit.sampling.preview import PreviewConfig, check_preview, draw_preview
from mmvit.training import Recipe, one_epoch, open_session, train, training_stream
from mmvit.training.caption_codes import CaptionCodesConfig, open_caption_codes
from mmvit.training.deepspeed_engine import zero_stage


class ClassesConfig(Config):
    """Shards with `png|jpg|webp` and `cls`, and what is done to the training pictures."""

    train: ShardPatterns
    held_out: ShardPatterns
    shuffle_buffer: int = Field(10_000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class JointRecipe(Recipe):
    """CONFIG.toml of this script."""

    classes: ClassesConfig
    captions: CaptionCodesConfig
    model: JointConfig
    samples: PreviewConfig = PreviewConfig()


def main() -> None:
    with open_session(JointRecipe, __doc__) as session:
        recipe, classes = session.recipe, session.recipe.classes
        check_preview(recipe.samples, recipe.model.generator)
        if zero_stage(session.deepspeed) == 3:
            raise UserError("stage 3 of ZeRO cuts up a core that is read twice in a pass: use 0, 1 or 2")
        sections = ("model.generator", "captions")
        captions = open_caption_codes(session, recipe.captions, recipe.model.generator, *sections)
        seen = recipe.model.classifier
        names = check_classes([*classes.train, *classes.held_out], seen.num_classes, "model.classifier")
        size = (seen.height_width, seen.num_classes)
        decode = ClassifierSample(*size, classes.augment)
        pictures = training_stream(session, classes.train, decode, classes.shuffle_buffer)
        held_out = one_epoch(session, classes.held_out, ClassifierSample(*size))

        model = Joint(recipe.model.model_copy(update={"generator": captions.config}))
        model.generator.start_from_codebook(captions.image_tokenizer.code_vectors())

        def evaluate(model: nn.Module) -> dict[str, float]:
            classified = classification_metrics(model.classifier, held_out)
            generated = generator_loss(model.generator, captions.held_out)
            losses = {"classification_loss": classified.pop("loss"), "generation_loss": generated.pop("loss")}
            loss = recipe.model.classification_weight * losses["classification_loss"]
            return {"loss": loss + losses["generation_loss"], **losses, **classified, **generated}

        def whole(model: nn.Module) -> Generator:
            tokenizers = (captions.text_tokenizer, captions.image_tokenizer)
            return Generator(model.generator, *tokenizers, recipe.samples.settings)

        def draw(model: nn.Module, step: int) -> None:
            draw_preview(whole(model), recipe.samples, session.run.samples / f"step-{step:06d}.png")

        def export(model: nn.Module, folder: Path) -> Any:
            whole(model).save_surroundings(folder)
            if names:
                write_json(names, folder / CLASSES)
            return model.save_pretrained(folder)

        train(
            session, model, PairedStream([pictures, captions.stream]), evaluate, after_evaluation=draw,
            export=export,
        )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
