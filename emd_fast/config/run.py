"""A whole run: the task with its teacher, the distillation, the evaluation and the logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emd_fast.config.emd import EMDConfig
from emd_fast.config.settings import ConfigError, documented, section, setting
from emd_fast.config.tables import validate


@documented
@dataclass(frozen=True)
class TeacherConfig:
    """Training of a teacher of small images: denoising score matching with EDM preconditioning."""

    network: Literal["unet", "dit"] = setting("unet", "the small UNet, or a small DiT of diffusers")
    steps: int = setting(2000, "optimizer steps", unit="steps", gt=0)
    batch_size: int = setting(128, "samples in a step", unit="samples", gt=0)
    lr: float = setting(4e-3, "learning rate of AdamW", gt=0)
    warmup: int = setting(100, "linear warm-up of the learning rate", unit="steps", ge=0)
    ema: float = setting(0.995, "decay of the average of the weights", ge=0, lt=1)
    log_sigma_mean: float = setting(-0.8, "mean of log sigma", unit="log sigma")
    log_sigma_std: float = setting(1.2, "standard deviation of log sigma", gt=0)
    channels: int = setting(
        16, "channels of the UNet at full resolution, or of a head of the DiT", unit="channels", gt=0
    )
    patch: int = setting(1, "side of the squares of pixels that are one position of the UNet", unit="pixels", gt=0)
    conditional: bool = setting(True, "condition on the class label")
    label_dropout: float = setting(
        0.0,
        "share of the images that are trained without their label, for guidance and samples of no class",
        ge=0,
        lt=1,
    )
    seed: int = setting(0, "seed of the weights, the data order and the noise", ge=0, lt=2**63)

    def __post_init__(self) -> None:
        validate(self)
        if self.label_dropout and not self.conditional:
            raise ConfigError(f"label_dropout must be 0 without conditional, got {self.label_dropout!r}")
        if self.network == "dit" and (self.label_dropout or not self.conditional or self.patch != 1):
            raise ConfigError(
                'network = "dit" has no label dropout, and its own patches of 2 pixels: '
                "give --teacher.conditional true --teacher.label-dropout 0 --teacher.patch 1"
            )


@documented
@dataclass(frozen=True)
class FashionConfig:
    """The images of the task fashion, and the classifier that judges them."""

    data: str = setting(
        "", "folder of the four IDX files; none for $EMD_FAST_FASHION, or that of Debian's package", resumable=True
    )
    resolution: int = setting(14, "side of an image: 28, or 14 for means of 2x2 pixels", unit="pixels")
    classifier_steps: int = setting(4000, "training steps of the classifier", unit="steps", gt=0)

    def __post_init__(self) -> None:
        validate(self)
        if self.resolution not in (14, 28):
            raise ConfigError(f"resolution must be 14 or 28, got {self.resolution}")


@documented
@dataclass(frozen=True)
class MixtureConfig:
    """The mixture of the task gmm, a ring of equal modes, and the small networks that learn it."""

    modes: int = setting(8, "modes on the ring", gt=0, le=4096)
    radius: float = setting(2.0, "radius of the ring", gt=0, le=1e6)
    std: float = setting(0.15, "standard deviation of a mode", gt=0, le=1e6)
    generator_width: int = setting(64, "hidden units of a layer of the generator", unit="units", gt=0, le=2**16)
    generator_layers: int = setting(2, "layers of the generator", unit="layers", gt=0, le=64)
    fake_score_width: int = setting(96, "hidden units of a layer of the fake score", unit="units", gt=0, le=2**16)
    fake_score_layers: int = setting(3, "layers of the fake score", unit="layers", gt=0, le=64)
    collapsed: bool = setting(False, "start the generator near one mode")

    def __post_init__(self) -> None:
        validate(self)


@documented
@dataclass(frozen=True)
class PretrainedConfig:
    """The teacher of the task pretrained."""

    teacher: str = setting(
        "", "diffusers folder, hub name, EDM checkpoint, or package.module:function if the command line names it"
    )
    teacher_config: str = setting("", "diffusers folder that describes a teacher in a single .safetensors file")
    prompts: str = setting("", "text file with one prompt a line, or .safetensors of conditions")
    negative_prompt: str = setting("", "prompt whose embedding is the null condition of prompts as text")
    prompt_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype in which embeddings of prompts are stored; bfloat16 takes half the disk"
    )
    sample_shape: tuple[int, int, int] | None = setting(
        None, "shape C,H,W of a sample; none for that of the folder's config.json", gt=0
    )
    height: int | None = setting(None, "height of a sample; none for the folder's", unit="pixels", gt=0)
    width: int | None = setting(None, "width of a sample; none for the folder's", unit="pixels", gt=0)
    frames: int | None = setting(None, "frames of a video; none for the usual number", unit="frames", gt=0)
    sizes: tuple[tuple[int, ...], ...] | None = setting(
        None,
        "several sizes in place of height and width, [height, width] or [height, width, frames] each; a step draws one",
        unit="pixels, frames",
    )
    embedded_guidance: float | None = setting(
        None, "guidance that the network takes as an input; none for its pipeline's default", ge=0
    )
    guidance_2: float | None = setting(
        None, "guidance weight of the second of two networks; none for that of the first"
    )

    def __post_init__(self) -> None:
        validate(self)


@documented
@dataclass(frozen=True)
class EvaluationConfig:
    """How a generator is judged; a pretrained teacher needs the files."""

    every: int = setting(0, "interval of evaluations during training; 0 for none", unit="images", ge=0, resumable=True)
    detector: str = setting(
        "",
        "TorchScript detector, as EDM's Inception; a program, which runs if the command line names it",
        resumable=True,
    )
    reference: str = setting("", "statistics of real images: .npz of EDM or .pkl of EDM2", resumable=True)
    compare_with: str = setting("", "folder or .zip of as many real images as samples", resumable=True)
    clip: str = setting("", "CLIP model folder, for the score of text prompts", resumable=True)

    def __post_init__(self) -> None:
        validate(self)
        for name in ("reference", "compare_with"):
            if getattr(self, name) and not self.detector:
                raise ConfigError(f"{name} needs a detector: give --detector FILE")


@documented
@dataclass(frozen=True)
class RunConfig:
    """A whole run. Recipes in recipes/*.toml and config.toml of a run folder are instances."""

    task: Literal["digits", "fashion", "gmm", "pretrained"] = setting("digits", "what is distilled")
    log_every: int = setting(
        10, "interval of log.jsonl; only these steps wait for the device", unit="steps", gt=0, resumable=True
    )
    save_every: int = setting(100, "interval of checkpoints", unit="steps", gt=0, resumable=True)
    keep_checkpoints: int = setting(2, "how many of the last checkpoints stay", gt=0, resumable=True)
    background_checkpoints: bool = setting(
        True, "write checkpoints during training, from a copy in host memory", resumable=True
    )
    peak_tflops: float = setting(
        0.0, "peak of a device in the compute dtype, for mfu; 0 if unknown", unit="TFLOP/s", ge=0, resumable=True
    )
    gradient_variance: bool = setting(False, "log the generator's gradient variance; costs two M-steps", resumable=True)
    samples: int = setting(
        2000,
        "samples of an evaluation; for digits and fashion the held-out images count",
        unit="samples",
        gt=0,
        resumable=True,
    )
    teacher: TeacherConfig = section(TeacherConfig, "the teacher of the tasks digits and fashion")
    fashion: FashionConfig = section(FashionConfig, "the images of the task fashion")
    mixture: MixtureConfig = section(MixtureConfig, "the mixture of the task gmm")
    pretrained: PretrainedConfig = section(PretrainedConfig, "the teacher of the task pretrained")
    emd: EMDConfig = section(EMDConfig, "the distillation")
    evaluation: EvaluationConfig = section(EvaluationConfig, "how a generator is judged")

    def __post_init__(self) -> None:
        validate(self)
        judged = self.evaluation
        if self.task != "pretrained":
            for name in ("detector", "reference", "compare_with", "clip"):
                if getattr(judged, name):
                    raise ConfigError(f"{name} is for pretrained teachers; the task {self.task!r} has its own figures")
        elif judged.every and not (judged.detector and judged.reference):
            raise ConfigError("evaluation.every needs a Fréchet distance: give --detector FILE and --reference FILE")
        for name in ("guidance_2", "negative_prompt"):
            if getattr(self.pretrained, name) and self.emd.guidance is None:
                option = name.replace("_", "-")
                raise ConfigError(f"{name} is for a guided teacher: give --guidance, or leave --{option} out")
        self._check_classes()

    def _check_classes(self) -> None:
        """Whether the generator's classes are those of a teacher that is trained here."""
        if self.task not in ("digits", "fashion"):
            return
        expected, classes = 10 if self.teacher.conditional else 0, self.emd.num_classes
        if classes != expected and not (classes == 0 and self.teacher.label_dropout):
            conditional = str(self.teacher.conditional).lower()
            raise ConfigError(
                f"num_classes must be {expected} for {self.task} with teacher.conditional = {conditional}, "
                f"got {classes!r}"
            )
