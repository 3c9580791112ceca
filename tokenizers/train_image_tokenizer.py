"""Train an image tokenizer on shards of images: VQ, or DALL·E's discrete VAE (`model.kind = "dvae"`).

    mmvit tokenizer image image_tokenizer_emoji
    mmvit tokenizer image image_tokenizer_emoji --train.steps 500 --output runs/short
    torchrun --nproc_per_node 2 -m mmvit tokenizer image image_tokenizer_emoji

Every evaluation reports the PSNR of held-out images, and the share of the codes that the training images
use. The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, codes.png (how
often each code occurs), previews/ (held-out images and their reconstructions), checkpoints/, and the
exported models best/ and last/, for `mmvit encode`.

A VQ tokenizer can learn from more than its pixels: from distances in the features of one of your
classifiers (`--loss.perceptual FOLDER`) or of VGG16 (LPIPS, `--loss.lpips FILE`), and from a discriminator
(`--loss.adversarial_weight 0.1`). These make images sharper at the cost of PSNR, which best/ is chosen by:
set `--train.select last` then.
"""

import warnings

from PIL import Image
from torch import Tensor, nn

from mmvit.cli import run_script
from mmvit.data.images import images_from_pixels
from mmvit.data.samples import PixelsSample
from mmvit.errors import UserError
from mmvit.evaluation.code_use import code_counts, draw_code_use, use_metrics
from mmvit.evaluation.reconstruction import reconstruction_metrics
from mmvit.interop.lpips import load_lpips
from mmvit.models.classifier import Classifier
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.perceptual import FeatureDistance
from mmvit.models.registry import build_model
from mmvit.models.tokenizer_objective import TokenizerObjective
from mmvit.models.vq import VQModel
from mmvit.recipes.command import training_script
from mmvit.recipes.image_tokenizer import ImageTokenizerRecipe
from mmvit.sampling.grids import labelled_grid
from mmvit.streams.stream import ShardStream
from mmvit.training import Session, one_epoch, train, training_stream
from mmvit.training.deepspeed_engine import zero_stage

DRAWN = 12  # held-out images
COLLAPSED = 0.5  # share of the codes in use below which an evaluation warns


def train_session(session: Session[ImageTokenizerRecipe]) -> None:
    data = session.recipe.data
    if session.deepspeed and getattr(session.recipe.model, "codebook_update", "") == "gradient":
        raise UserError(
            "model.codebook_update = 'gradient' revives dead codes in place, which DeepSpeed's copies "
            "undo: use 'ema', or remove --deepspeed"
        )
    model = build_model(session.recipe.model)
    model.grid(*data.image_size)
    plain = PixelsSample(data.image_size)
    training_once = one_epoch(session, data.train, plain)
    held_out = one_epoch(session, data.held_out, plain)
    wanted = getattr(session.recipe.model, "start_images", 0)
    if wanted and not any(session.run.checkpoints.glob("*")):
        buffer = data.shuffle_buffer
        shuffled = ShardStream(data.train, plain, wanted, shuffle_buffer=buffer, repeat=False)
        model.start_codes(next(iter(shuffled))["pixels"])
    decode = PixelsSample(data.image_size, data.augment)
    stream = training_stream(session, data.train, decode, data.shuffle_buffer)

    def evaluate(model: nn.Module) -> dict[str, float]:
        counts = code_counts(model, training_once)
        metrics = reconstruction_metrics(model, held_out) | use_metrics(counts)
        if session.processes.is_main:
            draw_code_use(counts, session.run.path / "codes.png")
            before = (r for r in session.run.read_metrics() if r["kind"] == "held_out")
            in_use = [record["codes_in_use"] for record in before] + [metrics["codes_in_use"]]
            if is_collapsing(in_use):
                warnings.warn(
                    f"only {in_use[-1]:.0%} of the codes are in use over the training images, after "
                    f"{in_use[-2]:.0%} at the last evaluation: the codebook is collapsing. Start again with "
                    "a lower optimizer.lr or fewer codes",
                    stacklevel=2,
                )
        return metrics

    drawn = None
    if session.processes.is_main:
        first = next(iter(one_epoch(session, data.held_out, plain)), None)
        if first is None:
            raise UserError(f"{', '.join(data.held_out)} has no images to evaluate on")
        drawn = first["pixels"][:DRAWN]

    def draw(model: nn.Module, step: int) -> None:
        if drawn is None:  # in other processes, whose weights are whole here (ZeRO 3)
            return
        session.run.previews.mkdir(exist_ok=True)
        draw_reconstructions(model, drawn).save(session.run.previews / f"step-{step:06d}.png")

    if not session.recipe.loss.adds_anything:
        train(session, model, stream, evaluate, after_evaluation=draw)
        return
    train(
        session,
        build_objective(session, model),
        stream,
        lambda objective: evaluate(objective.tokenizer),
        after_evaluation=lambda objective, step: draw(objective.tokenizer, step),
        export=lambda objective, folder: objective.tokenizer.save_pretrained(folder),
    )


def is_collapsing(in_use: list[float]) -> bool:
    """Whether few codes are in use and hardly more than before, or far fewer than before."""
    if len(in_use) < 2:
        return False
    *_, before, now = in_use
    return (now < COLLAPSED and now < 1.1 * before) or now < 0.75 * before


def draw_reconstructions(model: ImageTokenizer, pixels: Tensor) -> Image.Image:
    """`pixels` (images, 3, height, width) in a row, each above its reconstruction."""
    device = next(model.parameters()).device
    made = model.decode(model.encode(pixels.to(device))).cpu()
    return labelled_grid([images_from_pixels(each) for each in (pixels, made)], ["held-out", "tokenizer"])


def build_objective(session: Session[ImageTokenizerRecipe], model: VQModel) -> TokenizerObjective:
    """The objective of `[loss]`.

    Raises:
        UserError: if weights cannot be read, images are too small, or DeepSpeed does not support it.
    """
    config, size = session.recipe.loss, session.recipe.data.image_size
    if zero_stage(session.deepspeed) == 3 and config.adversarial_weight:
        raise UserError(
            "loss.adversarial_weight needs the discriminator's whole weights, which ZeRO 3 shards: use "
            "stage 0, 1 or 2, or remove --deepspeed"
        )
    distances = {}
    if config.perceptual:
        distances["perceptual"] = FeatureDistance(Classifier.from_pretrained(config.perceptual))
    if config.lpips:
        distances["lpips"] = load_lpips(config.lpips)
    objective = TokenizerObjective(model, config, distances)
    objective.check_size(*size)
    return objective


main = training_script(train_session, "image-tokenizer")

if __name__ == "__main__":
    run_script(main)
