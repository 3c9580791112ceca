"""Train one core for two tasks, from shards of images with classes and shards of captions with codes.

    mmvit train emoji_joint
    mmvit evaluate runs/emoji-joint data/emoji --split combinations --out joint.png

The result classifies images, draws captions, and chooses captions for images. Every batch has
`train.batch_size` images with classes and as many captions. The run folder holds one model with both
tokenizers (best/, by the weighted sum of both held-out losses, and last/), from which
`mmvit.Generator.from_pretrained` and `mmvit.Classifier.from_pretrained` each read their part. --resume
continues.
"""

from pathlib import Path
from typing import Any

from torch import nn

from mmvit.cli import run_script
from mmvit.data.samples import ClassifierSample
from mmvit.errors import UserError
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.evaluation.image_classifier import CLASSES
from mmvit.evaluation.likelihood import generator_loss
from mmvit.files import write_json
from mmvit.models.joint import Joint
from mmvit.recipes.caption_codes import open_caption_codes
from mmvit.recipes.command import training_script
from mmvit.recipes.facts import class_names, folders_of
from mmvit.recipes.joint import JointRecipe
from mmvit.sampling.generator import Generator
from mmvit.sampling.preview import draw_preview
from mmvit.streams.paired import PairedStream
from mmvit.training import Session, one_epoch, train, training_stream
from mmvit.training.deepspeed_engine import zero_stage


def train_session(session: Session[JointRecipe]) -> None:
    recipe, classes = session.recipe, session.recipe.classes
    if zero_stage(session.deepspeed) == 3:
        raise UserError(
            "a joint model runs its core twice in a pass, which ZeRO 3 cannot: use stage 0, 1 or 2"
        )
    captions = open_caption_codes(session, recipe.captions, recipe.model.generator, "captions")
    config = recipe.model.classifier
    names = class_names(folders_of(classes.train, classes.held_out))
    decode = ClassifierSample(config.height_width, config.num_classes, classes.augment)
    images = training_stream(session, classes.train, decode, classes.shuffle_buffer)
    decode = ClassifierSample(config.height_width, config.num_classes)
    held_out = one_epoch(session, classes.held_out, decode)

    model = Joint(recipe.model)
    model.generator.start_from_codebook(captions.image_tokenizer.code_vectors())

    def evaluate(model: nn.Module) -> dict[str, float]:
        classified = classification_metrics(model.classifier, held_out)
        generated = generator_loss(model.generator, captions.held_out)
        losses = {"classification_loss": classified.pop("loss"), "generation_loss": generated.pop("loss")}
        loss = recipe.model.classification_weight * losses["classification_loss"]
        return {"loss": loss + losses["generation_loss"], **losses, **classified, **generated}

    def with_tokenizers(model: nn.Module) -> Generator:
        tokenizers = (captions.text_tokenizer, captions.image_tokenizer)
        return Generator(model.generator, *tokenizers, recipe.preview.settings)

    def draw(model: nn.Module, step: int) -> None:
        path = session.run.previews / f"step-{step:06d}.png"
        draw_preview(with_tokenizers(model), recipe.preview, path)

    def export(model: nn.Module, folder: Path) -> Any:
        with_tokenizers(model).save_surroundings(folder)
        if names:
            write_json(names, folder / CLASSES)
        return model.save_pretrained(folder)

    stream = PairedStream([images, captions.stream])
    train(session, model, stream, evaluate, after_evaluation=draw, export=export)


main = training_script(train_session, "joint")

if __name__ == "__main__":
    run_script(main)
