"""Train a generator, from captions to image codes, on shards made by `mmvit encode`.

    mmvit train emoji_demo
    mmvit train emoji_demo --train.steps 100 --output runs/short
    mmvit train finetune_emoji --output runs/mine
    torchrun --nproc_per_node 2 -m mmvit train emoji_demo

With `start.model`, training continues from a trained generator, with its architecture and its tokenizers.
`start.translate_from = "en"` takes an English generator to the languages of data.languages: captions of the
same image tell which words mean the same.

The run folder gets the model with both tokenizers (best/, last/), ready for `mmvit sample`, and a grid of
images at every evaluation (previews/). Ctrl-C saves before it stops; --resume continues exactly there.
"""

from pathlib import Path

import torch
from torch import nn

from mmvit.cli import run_script
from mmvit.data.translation import token_translations
from mmvit.evaluation.likelihood import generator_loss
from mmvit.models.fine_tuning import continued, take_core
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.recipes.caption_codes import CaptionCodes, open_caption_codes
from mmvit.recipes.command import training_script
from mmvit.recipes.generator import GeneratorRecipe
from mmvit.sampling.generator import Generator
from mmvit.sampling.preview import draw_preview
from mmvit.training import Session, train


def train_session(session: Session[GeneratorRecipe]) -> None:
    recipe = session.recipe
    data = open_caption_codes(session, recipe.data, recipe.model)
    model = starting_model(session, data)

    def with_tokenizers(model: nn.Module) -> Generator:
        return Generator(model, data.text_tokenizer, data.image_tokenizer, recipe.preview.settings)

    def draw(model: nn.Module, step: int) -> None:
        path = session.run.previews / f"step-{step:06d}.png"
        own = path if session.processes.is_main else None
        draw_preview(with_tokenizers(model), recipe.preview, own)

    def export(model: nn.Module, folder: Path) -> Path:
        return with_tokenizers(model).save_pretrained(folder)

    train(
        session,
        model,
        data.stream,
        evaluate=lambda model: generator_loss(model, data.held_out),
        after_evaluation=draw,
        export=export,
    )


def starting_model(session: Session[GeneratorRecipe], data: CaptionCodes) -> GeneratorTransformer:
    """The model before its first step; a resumed run gets its weights from the checkpoint.

    Raises:
        UserError: if the start was trained with other tokenizers.
    """
    recipe, start = session.recipe, session.recipe.start
    if session.continues:
        return GeneratorTransformer(recipe.model)
    if not start.model:
        model = GeneratorTransformer(recipe.model)
        if start.codebook:
            model.start_from_codebook(data.image_tokenizer.code_vectors())
        if start.core:
            take_core(model, start.core)
        return model
    source = Generator.from_pretrained(start.model, "cpu")
    for name, same in (
        ("text_tokenizer", source.text_tokenizer.is_same(data.text_tokenizer)),
        ("image_tokenizer", same_weights(source.image_tokenizer, data.image_tokenizer)),
    ):
        if not same:
            raise start.other(name)
    model = continued(source.transformer, recipe.model)
    if language := start.translate_from:
        words = token_translations(recipe.data.train, data.text_tokenizer, language, recipe.data.languages)
        started = model.start_from_translations(*words)
        session.say(f"{started:,} tokens that no caption in {language} uses start as mixtures of its tokens")
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights in bfloat16, in which they may have been saved."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].bfloat16(), theirs[name].cpu().bfloat16()) for name in ours
    )


main = training_script(train_session, "generator")

if __name__ == "__main__":
    run_script(main)
