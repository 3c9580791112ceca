"""The training loop: one for every model with `loss(batch)`, on any engine, resumed bit for bit."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mmvit.errors import UserError, did_you_mean
from mmvit.streams.stream import WorkerKilled
from mmvit.streams.tally import Tally
from mmvit.training.checkpoint import Checkpoints, random_state, set_random_state, undisturbed_randomness
from mmvit.training.display import Display
from mmvit.training.distributed import Processes, choose_precision
from mmvit.training.engine import Engine, TorchEngine
from mmvit.training.interruption import Interruption
from mmvit.training.resume import Progress, Stream, find_checkpoint, resume, save
from mmvit.training.session import Session, seed_everything

AFTER_TRAINING = {"output", "train.select"}  # settings that a run without a step left can still take
ERRORS = {"l1"}  # metrics that are better when lower, beside losses
LAST = "last"  # of train.select: best/ is not written, and last/ is the run's model


def train(
    session: Session,
    model: nn.Module,
    stream: Stream,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    after_evaluation: Callable[[nn.Module, int], None] | None = None,
    export: Callable[[nn.Module, Path], Any] | None = None,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Progress:
    """Trains `model` for `train.steps` optimizer steps, and writes metrics and models to the run folder.

    Args:
        model: has `loss(batch) -> (scalar, metrics)`, and `save_pretrained(folder)` unless `export` is given.
        stream: endless batches of `session.micro_batch_size` samples for this process.
        evaluate: returns held-out metrics of a model; every process calls it, and the results are averaged.
            `train.select` names the one that chooses `best/`: the lowest of a loss or an error, else the
            highest.
        after_evaluation: called by the main process with the evaluated model and the step; may draw images.
            Under ZeRO 3 all processes call it, of which none could draw alone.
        export: writes a model into a folder, for `best/` and `last/`.
        prepare: transforms each batch before its training pass; may draw from torch's generator.

    Raises:
        UserError: if the loss or the gradient is not finite, or the checkpoint does not fit.
        SystemExit: with 130 after Ctrl-C and 143 after SIGTERM, once a checkpoint is written.
    """
    config, processes, run = session.recipe.train, session.processes, session.run
    select = config.select or session.recipe.selects
    engine = build_engine(session, model)
    checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints, processes)
    progress, changes, folder = Progress(), {}, None
    seed_everything(config.seed + 1 + processes.rank)  # dropout differs between processes
    if session.resume:
        folder, problems = find_checkpoint(session, checkpoints)
        for problem in problems:
            session.say(f"warning: {problem}; going on from {folder.name}")
        if folder:
            progress, changes = resume(session, folder, engine, stream)
        else:
            processes.on_main(run.refuse_lost_checkpoints)
        processes.on_main(lambda: run.rewind(progress.step, not progress.lacks_evaluation))
    done = progress.step >= config.steps
    if recorded := not done or (progress.step == config.steps and changes.keys() <= AFTER_TRAINING):
        processes.on_main(lambda: run.write_config(session.recipe))

    def export_to(folder: Path, trained: nn.Module) -> None:
        write = trained.save_pretrained if export is None else partial(export, trained)
        if engine.how is None:
            processes.on_main(lambda: run.export(folder, write))
            return

        def write_together() -> None:
            with engine.how.exporting(), TemporaryDirectory() as scratch:
                if processes.is_main:
                    run.export(folder, write)
                else:
                    write(Path(scratch))

        processes.together(write_together)

    def hold_out(trained: nn.Module) -> None:
        progress.lacks_evaluation = True
        metrics = processes.mean(evaluate(trained))
        progress.lacks_evaluation = False
        if select not in (*metrics, LAST):
            raise UserError(f"train.select: unknown metric {select}{did_you_mean(select, [*metrics, LAST])}")
        report(session, display, {"kind": "held_out", **counts(progress), **metrics})
        mode = "min" if "loss" in select or select in ERRORS else "max"
        if select != LAST and progress.improves(select, metrics[select], mode):
            export_to(run.best, trained)
        if after_evaluation and (processes.is_main or engine.how):
            seed_everything(progress.step)  # all processes draw the same
            after_evaluation(trained, progress.step)

    def evaluate_now() -> None:
        try:
            with engine.evaluating() as trained, undisturbed_randomness(processes.device):
                hold_out(trained)
        except UserError:  # held-out data that cannot be read; perhaps by one process alone
            if processes.world_size == 1:
                save(session, checkpoints, engine, stream, progress)
            raise

    with (
        Interruption() as interruption,
        Display(session, progress.step) as display,
        closing(iter(stream)) as raw,  # its processes end with it, not with the interpreter
    ):
        batches = raw if prepare is None else map(prepare, raw)
        if session.resume:
            where = f"resuming at step {progress.step} of {config.steps}"
            if done:
                where = f"the run is already at step {progress.step} and train.steps is {config.steps}: "
                where += "nothing left to train; raise train.steps to go on"
            kept = [] if recorded else [f"{run.path / 'config.toml'} keeps the settings of its training"]
            display.say("; ".join([where, *kept, *changes.values()]))
            if folder:
                with engine.evaluating() as trained:  # the run may have died before it could export this
                    export_to(run.last, trained)
        if session.recipe.optimizer.warmup_steps >= config.steps and not done:
            display.say(
                f"optimizer.warmup_steps {session.recipe.optimizer.warmup_steps} covers all train.steps "
                f"{config.steps}, so the learning rate never reaches its peak"
            )
        if progress.step + config.log_every < config.steps:
            left = config.steps - progress.step
            precision = str(choose_precision(config.precision, processes.device)).removeprefix("torch.")
            display.say(
                f"{left} steps of {config.batch_size} samples in {precision}, a line every {config.log_every}"
            )
        if evaluate and progress.lacks_evaluation:
            evaluate_now()
            save(session, checkpoints, engine, stream, progress)
        shown = (progress.examples, progress.seconds)  # at the last log line
        first_step = progress.step
        while progress.step < config.steps:
            started = time.perf_counter()
            place, sums, passes = stream.state_dict(), dict(progress.sums), dict(progress.passes)
            randomness = random_state(processes.device) if config.accumulation > 1 else None  # takes 0.2 ms
            try:
                norm, stop = train_step(session, engine, batches, progress, interruption)
            except WorkerKilled:  # of one process perhaps, while the others wait for it in the step
                if processes.world_size == 1:
                    stream.load_state_dict(place)  # what the unfinished step has taken is taken again
                    progress.sums, progress.passes = sums, passes
                    if randomness:
                        set_random_state(randomness, processes.device)
                    save(session, checkpoints, engine, stream, progress)
                raise
            progress.seconds += time.perf_counter() - started
            display.advance(progress.step)
            if progress.step == first_step + 2:
                display.say_pace((progress.seconds - shown[1]) / 2, config.steps - progress.step)
            is_last = progress.step == config.steps

            if progress.step % config.log_every == 0 or is_last:
                speed = (progress.examples - shown[0]) / (progress.seconds - shown[1])
                report(session, display, training_record(session, engine, progress, norm, speed))
                shown = (progress.examples, progress.seconds)
            if evaluate and (progress.step % config.evaluate_every == 0 or is_last):
                evaluate_now()
            if progress.step % config.checkpoint_every == 0 or is_last or stop:
                save(session, checkpoints, engine, stream, progress)
                with engine.evaluating() as trained:
                    export_to(run.last, trained)
            if stop and not is_last:
                name = signal.Signals(stop).name
                display.say(f"{name}: saved at step {progress.step}; add --resume to the command to continue")
                raise SystemExit(128 + stop)
        evaluated = sum_tallies(processes, session.evaluated)
        if evaluated.skipped or evaluated.broken_shards:
            display.say(f"all evaluations: {evaluated.describe()}")
        if not done:
            display.say(f"{sum_tallies(processes, [stream]).describe()}; the run is in {run.path}")
    return progress


def sum_tallies(processes: Processes, streams: list[Stream]) -> Tally:
    """The tallies of `streams`, summed over all processes."""
    own = reduce(Tally.plus, (stream.tally for stream in streams), Tally())
    return reduce(Tally.plus, processes.gather(own), Tally())


def build_engine(session: Session, model: nn.Module) -> Engine:
    recipe = session.recipe
    if session.deepspeed is None:
        return TorchEngine(model, recipe.train, recipe.optimizer, session.processes)
    from mmvit.training.deepspeed_engine import DeepSpeedEngine  # DeepSpeed exists on Linux only

    return DeepSpeedEngine(model, recipe.train, recipe.optimizer, session.processes, session.deepspeed)


def train_step(
    session: Session,
    engine: Engine,
    batches: Iterator[dict[str, Any]],
    progress: Progress,
    interruption: Interruption,
) -> tuple[float, int]:
    """One optimizer step. Returns the gradient's norm, and the signal to stop for (0 for none), agreed on by
    all processes."""
    config, processes = session.recipe.train, session.processes
    broken = None
    for _ in range(config.accumulation):
        batch = next(batches)
        loss, metrics = engine.loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            broken = not_finite(f"the loss is {value}", progress, batch)
        progress.add({**metrics, "loss": value})
        engine.backward(loss)
    any_broken, stop = processes.largest(int(broken is not None), interruption.signal)
    if broken:
        raise broken
    if any_broken:
        raise SystemExit(2)  # the process with the broken loss says why
    norm = engine.step(progress.step + 1)
    if not math.isfinite(norm):
        raise not_finite(f"the gradient's norm is {norm}", progress, batch)
    progress.step += 1
    progress.examples += config.batch_size
    return norm, stop


def not_finite(problem: str, progress: Progress, batch: dict[str, Any]) -> UserError:
    keys = [str(key) for key in batch.get("keys", [])]
    samples = f" in the batch of {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" if keys else ""
    return UserError(
        f"step {progress.step + 1}: {problem}{samples}. Look at these samples, lower optimizer.lr, or set "
        "train.precision to fp32"
    )


def training_record(
    session: Session, engine: Engine, progress: Progress, norm: float, speed: float
) -> dict[str, Any]:
    """Metrics averaged over passes and processes since the last record; resets the sums."""
    means = session.processes.mean(progress.take_means())
    return {
        "kind": "train",
        **counts(progress),
        **({"epoch": round(progress.examples / size, 3)} if (size := session.samples_per_epoch) else {}),
        "lr": engine.rate(),
        "grad_norm": norm,
        "images_per_s": round(speed, 1),
        **means,
    }


def counts(progress: Progress) -> dict[str, Any]:
    return {"step": progress.step, "examples": progress.examples, "seconds": round(progress.seconds, 3)}


def report(session: Session, display: Display, record: dict[str, Any]) -> None:
    display.show(record)
    if session.processes.is_main:
        session.run.write_metrics(record)
        if record["kind"] == "held_out" or record["step"] == session.recipe.train.steps:
            session.run.draw_curves()
