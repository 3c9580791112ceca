"""Train CLIP on shards of images with captions: which image belongs to which caption.

    mmvit train emoji_clip
    torchrun --nproc_per_node 2 -m mmvit train emoji_clip

The run folder holds the model with its text tokenizer (best/, by the share of held-out images whose own
caption is the nearest of all held-out ones, and last/), for `mmvit sample --candidates 16 --scorer RUN` and
`mmvit.CaptionScorer`. --resume continues.
"""

from mmvit.cli import run_script
from mmvit.data.captions import TextTokenizer, caption_lengths
from mmvit.data.samples import CaptionIdsPixelsSample
from mmvit.evaluation.clip_report import retrieval
from mmvit.models.clip import CLIP
from mmvit.recipes.clip import CLIPRecipe
from mmvit.recipes.command import training_script
from mmvit.sampling.candidates import CaptionScorer
from mmvit.training import Session, one_epoch, train, training_stream


def train_session(session: Session[CLIPRecipe]) -> None:
    config, data = session.recipe.model, session.recipe.data
    text_tokenizer = TextTokenizer.from_file(data.text_tokenizer)
    lengths = caption_lengths(data.train, text_tokenizer, config.text_length, data.languages)
    if longer := lengths.describe():
        session.say(longer)
    shape = (text_tokenizer, config.text_length, config.image.height_width)
    decode = CaptionIdsPixelsSample(*shape, data.languages, data.bpe_dropout, data.augment)
    stream = training_stream(session, data.train, decode, data.shuffle_buffer)
    decode = CaptionIdsPixelsSample(*shape, data.languages[:1])
    held_out = one_epoch(session, data.held_out, decode, whole=True)  # every pair is compared with all
    train(
        session,
        CLIP(config),
        stream,
        evaluate=lambda model: retrieval(model, held_out),
        export=lambda model, folder: CaptionScorer(model, text_tokenizer).save_pretrained(folder),
    )


main = training_script(train_session, "clip")

if __name__ == "__main__":
    run_script(main)
