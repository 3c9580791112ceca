"""Settings that every recipe shares: the run, its optimizer, and where its results go."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from mmvit.config import IN_STEPS, Config
from mmvit.streams.address import on_this_machine


class TrainConfig(Config):
    """The run. Steps are optimizer steps, whatever the accumulation."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(
        64, ge=1, description="samples per optimizer step, in all processes and passes together"
    )
    accumulation: int = Field(1, ge=1, description="forward and backward passes per optimizer step")
    seed: int = Field(0, ge=0, lt=2**63)  # torch takes 64 bits; processes add their rank
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the averaged weights, which are evaluated and exported; 0 turns them off",
    )
    select: str | None = Field(
        None,
        description='the held-out metric that best/ is chosen by, or "last" to use the last weights; by '
        "default what the recipe's figures are measured on",
    )
    evaluate_every: int = Field(500, ge=1, json_schema_extra=IN_STEPS)
    checkpoint_every: int = Field(500, ge=1, json_schema_extra=IN_STEPS)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(20, ge=1)
    num_workers: int = Field(1, ge=0, description="data workers per training process")
    timeout: float = Field(
        600, gt=0, description="seconds that processes wait for one another before the run ends"
    )
    tensorboard: bool = False
    wandb: bool = False

    @model_validator(mode="after")
    def _accumulation_divides_batch(self):
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """The optimizer: linear warm-up to `lr`, then `schedule` down to `final_lr_ratio` · `lr`."""

    name: Literal["adamw", "muon", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    muon_lr: float | None = Field(
        None, gt=0, description="rate of Muon for hidden layers, on AdamW's scale; `lr` by default"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="for sgd and lars")
    trust: float = Field(
        1e-3, gt=0, description="for lars: the norm of a matrix's update relative to the matrix"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of each layer relative to the layer above it",
    )
    warmup_steps: int = Field(100, ge=0, json_schema_extra=IN_STEPS)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: float = Field(0.01, ge=0, le=1)


class Recipe(Config):
    """What a recipe holds, whatever its task; each task adds its data and model (mmvit/recipes)."""

    task: str
    output: Annotated[Path, AfterValidator(on_this_machine)]
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    selects: ClassVar[str] = "loss"  # the default of train.select
    starts_from: ClassVar[str | None] = None  # the kind of model that start.model may name

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Any]:
        """The settings that data determine, as `mmvit.recipes.facts.Fact`s."""
        return []

    def check_start(self, begun: dict[str, Any]) -> None:
        """Raises UserError if training cannot begin from weights of a model with the settings `begun`."""
