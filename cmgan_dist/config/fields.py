"""Every setting of a run: its type, range, default and docstring, and whether a run that goes on may change it.

The dataclasses are validated once (`load.validate`) and written beside the run. A number has a `Range`, both ends
included; `Resumable` and `Mutable` stand where a run can go on with another value (`markers`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cmgan_dist.config.markers import Mutable, Range, Resumable

CONFIG_NAME = "config.yaml"

Count = Annotated[int, Range(1, 1e9)]
Width = Annotated[int, Range(1, 1e6)]
Share = Annotated[float, Range(0, 0.999)]
Weight = Annotated[float, Range(0, 1e9), Mutable]
Temperature = Annotated[float, Range(1e-4, 1e4), Mutable]
Rate = Annotated[float, Range(0, 1e3), Resumable, Mutable]
Decay = Annotated[float, Range(0, 0.99999)]
MixtureWeight = Annotated[float, Range(1e-9, 1e9)]
Pool = Literal["sentence", "max", "cls"]
KernelSize = Annotated[int, Range(1, 1000)]


@dataclass
class StreamConfig:
    """How samples reach the model."""

    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that decides which checkpoint is best; never the test split."""
    sampling: Literal["epoch", "balanced"] = "epoch"
    """epoch: every sample once an epoch. balanced: two different classes drawn per slot, then one sample of each
    (the reference recipe; needs labels and random access)."""
    global_batch: Annotated[int, Range(2, 1e9)] = 64
    """Samples per update over all ranks together."""
    logical_streams: Annotated[int, Range(0, 1e6)] = 0
    """S: parts into which an epoch is cut, whatever the world size. A multiple of the world size and a divisor of
    global_batch. 0: the largest common divisor of global_batch and 48."""
    window: Count = 8
    """Shards of a logical stream whose samples are shuffled together."""
    workers: Annotated[int, Range(0, 1024), Resumable] = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    augment: bool = True
    """Random resized crop and flip of training images, seeded by position. Features are never augmented."""
    max_bad_share: Annotated[float, Range(0, 1), Resumable] = 0.01
    """Stop when more than this share of the samples read is unusable."""
    weights: tuple[MixtureWeight, ...] = ()
    """Mixture: share of each data set that --data names; empty goes by their numbers of samples."""
    cache: Annotated[str, Resumable] = ""
    """Folder on local disk for shards of http(s), s3 and gs URLs; "" is cmgan_dist/shards in the user's cache."""
    cache_gib: Annotated[float, Range(1e-6, 1e9), Resumable] = 32.0
    """Largest size of that folder in GiB. It should hold two windows of every logical stream on the node."""
    retries: Annotated[int, Range(0, 100), Resumable] = 4
    """Further tries when a remote source fails, with growing waits between."""
    timeout_s: Annotated[float, Range(0.01, 1e5), Resumable] = 30.0
    """Seconds to connect to a remote source, and to wait for its next byte."""


@dataclass
class ImageBackboneConfig:
    """What turns an image into a feature vector."""

    name: str = "features"
    """"features" (precomputed in the shards), any timm model, such as tf_efficientnet_lite0 or vgg19, or a tower of
    open_clip, such as open_clip:ViT-B-32."""
    weights: str = ""
    """"" random, "hub" timm's download, a .pth or .safetensors file, or "package:NAME" for weights in a package. Of
    open_clip: "hub:TAG", a file, or a folder with open_clip_config.json."""
    trainable: bool = False
    """Fine-tune it with the generator; else it is frozen and in eval mode."""
    checkpoint: bool = False
    """Trained: keep few activations and compute the others again in the backward pass: less memory, a third slower."""
    image_size: Annotated[int, Range(8, 4096)] = 224
    """Side of the square input in pixels."""


@dataclass
class TextBackboneConfig:
    """What turns a text into a feature vector."""

    name: str = "features"
    """"features" (precomputed), "cnn" (Kim 2014), "sentence" (a sentence-transformers model) or a tower of open_clip,
    such as open_clip:ViT-B-32."""
    weights: str = ""
    """sentence: a folder, "hub:NAME" or "package:NAME". cnn: a word2vec or GloVe file, or "" for random words. Of
    open_clip: "hub:TAG", a file, or a folder with open_clip_config.json."""
    trainable: bool = False
    """Fine-tune it with the generator. The cnn's convolutions are always trained; false keeps word vectors that came
    from a file as they are."""
    checkpoint: bool = False
    """sentence or open_clip, trained: keep few activations and compute the others again in the backward pass."""
    pools: tuple[Pool, ...] = ("sentence",)
    """sentence: what of a text's tokens makes its feature, one after another: "sentence" as the model itself pools
    them, "max" over the tokens, "cls" the first token; the latter two at unit length."""
    max_tokens: Width = 64
    """Longer texts are cut."""
    word_dim: Width = 300
    """cnn: word vector dimension."""
    kernel_sizes: tuple[KernelSize, ...] = (3, 4, 5)
    """cnn: widths of the convolutions in words."""
    channels: Width = 100
    """cnn: channels per width."""
    dropout: Share = 0.5
    """cnn: dropout of the sentence vector."""
    vocabulary_size: Count = 50_000
    """cnn: words kept, most frequent first."""
    min_count: Count = 1
    """cnn: rarer words become unknown."""


@dataclass
class ModelConfig:
    """Networks of generator and discriminators (docs/reference.md)."""

    image: ImageBackboneConfig = field(default_factory=ImageBackboneConfig)
    text: TextBackboneConfig = field(default_factory=TextBackboneConfig)
    hidden_dim: Width = 1024
    """Width of the modality-specific encoder layer and of the decoder's hidden layer."""
    common_dim: Width = 1024
    """E: dimension of the common space."""
    discriminator_dim: Width = 512
    """Hidden width of the inter-modality discriminators."""
    share_layers: bool = True
    """Image and text share the second encoder layer; false is the ablation "not shared"."""
    share_classifier: bool = False
    """One classifier for both modalities."""
    input_norm: Literal["none", "batch", "l2"] = "none"
    """Features before the first layer: as they are, standardised per dimension by batch statistics, or unit length."""
    input_dropout: Annotated[Share, Mutable] = 0.0
    """Dropout of the (normalised) features at the encoder's input."""
    dropout: Annotated[Share, Mutable] = 0.0
    """Dropout after the encoder's first layer."""
    common_activation: bool = True
    """LeakyReLU after the shared layer's BatchNorm, as in the reference."""
    spectral_norm: bool = False
    """Spectral normalisation of the discriminators' linear layers (Miyato et al., ICLR 2018)."""
    kernels: Annotated[Literal["auto", "triton", "torch"], Resumable] = "auto"
    """BatchNorm, LeakyReLU and dropout after each linear layer: "triton" fused on a GPU, "torch" one op after another,
    "auto" triton where it runs. The log says once which path was taken and why."""


@dataclass
class LossConfig:
    """Loss terms and their weights (docs/reference.md). A weight of 0 turns a term off."""

    adversarial: Annotated[Literal["bce", "hinge", "wgan-gp"], Mutable] = "bce"
    """Form of all adversarial losses."""
    mismatch: Annotated[Literal["reference", "conditional"], Mutable] = "reference"
    """Mismatched input of the inter-modality discriminators: (mismatched common, mismatched feature) as in the
    published code, or (mismatched common, the row's own feature)."""
    intra: Weight = 1.0
    """Generator: fool the intra-modality discriminators with reconstructions."""
    inter: Weight = 1.0
    """Generator: fool the inter-modality discriminators with the other modality's common representation."""
    modality: Weight = 0.0
    """Generator: hide from a discriminator, which knows the class, whether a common representation is of an image or of
    a text (Miyato & Koyama's projection, ICLR 2018). loss.r1=1 steadies it at weights of .5 and more."""
    classification: Weight = 1.0
    """Generator: classify common representations (softmax, or sigmoid per class for multi-label data)."""
    contrastive: Weight = 0.0
    """Generator: InfoNCE between the image and text common representations of a batch, both directions."""
    class_contrastive: Weight = 0.0
    """Generator: supervised contrastive term across modalities, positives share a class (Khosla et al., 2020)."""
    temperature: Temperature = 0.07
    """Temperature of the contrastive term."""
    class_temperature: Temperature = 0.2
    """Temperature of the class contrastive term."""
    label_smoothing: Annotated[Share, Mutable] = 0.0
    """Of the softmax classification."""
    r1: Weight = 0.0
    """Discriminators: R1 penalty on real input (Mescheder et al., ICML 2018), gamma / 2 * |grad|^2."""
    r1_every: Annotated[Count, Mutable] = 16
    """Batches between R1 steps (lazy regularisation); the penalty is scaled by it."""
    gradient_penalty: Weight = 10.0
    """wgan-gp: weight of the penalty."""


@dataclass
class OptimConfig:
    """Adam, its rates and their schedule."""

    generator_lr: Rate = 1e-3
    """Learning rate of the generator."""
    discriminator_lr: Rate = 1e-3
    """Learning rate of the discriminators."""
    generator_beta1: Decay = 0.5
    """Adam's first-moment decay of the generator."""
    discriminator_beta1: Decay = 0.5
    """Adam's first-moment decay of the discriminators."""
    beta2: Annotated[float, Range(0, 0.9999999)] = 0.999
    """Adam's second-moment decay."""
    weight_decay: Annotated[float, Range(0, 1e3)] = 0.0
    """Decoupled weight decay of the generator."""
    generator_steps: Annotated[int, Range(1, 1000), Mutable] = 5
    """Generator updates per batch, after one update of each discriminator."""
    update: Literal["alternate", "joint"] = "alternate"
    """alternate: image side, then text side, each with its own step (reference). joint: one step on both sides."""
    schedule: Literal["halve", "cosine", "constant"] = "halve"
    """halve: half the rate every halve_every epochs (reference). Counted in samples."""
    halve_every: Annotated[float, Range(1e-6, 1e9)] = 100.0
    """Epochs between halvings."""
    warmup_epochs: Annotated[float, Range(0, 1e9)] = 0.0
    """Linear warm-up from 0."""
    clip: Annotated[float, Range(0, 1e9), Resumable] = 0.0
    """Largest gradient norm per optimiser; 0 is off."""
    accumulate: Annotated[int, Range(1, 1e6)] = 1
    """Parts that a batch is cut into, for batches that do not fit into memory: an update takes the mean gradient of
    its parts; BatchNorm statistics, negatives and mismatched samples are those of a part (over all processes)."""


@dataclass
class TrainConfig:
    """Length, precision, validation and checkpoints."""

    epochs: Annotated[float, Range(1e-9, 1e9), Resumable] = 1000.0
    """Length of the run in passes over the training split."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of initialisation, order, dropout and draws."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], Resumable] = "fp32"
    """fp32, or autocast to bf16 or fp16 (losses and statistics stay fp32; fp16 with a loss scaler per optimiser)."""
    reduce_precision: Annotated[Literal["fp32", "bf16"], Resumable] = "fp32"
    """In what gradients travel between processes; bf16 halves their bytes and rounds them."""
    shard_backbones: Annotated[bool, Resumable] = False
    """Divide trained backbones among the processes, parameters, gradients and moments (FSDP2); what trains is the
    same. For backbones that do not fit; more is sent."""
    compile: Annotated[bool, Resumable] = False
    """torch.compile the networks: pays on GPUs with small batches, costs seconds to minutes at the start."""
    ema: Annotated[float, Range(0, 0.999999), Resumable] = 0.0
    """Decay per batch of an exponential moving average of the generator, used in evaluation; 0 is off."""
    val_every: Annotated[float, Range(0, 1e9), Resumable] = 10.0
    """Epochs between validations; 0 validates at the end only."""
    select: Annotated[Literal["best", "last"], Resumable] = "best"
    """Which generator is kept in best/: that of the best validation, or of the last, where a validation split is too
    small to tell and the schedule ends at a rate of 0."""
    save_every: Annotated[float, Range(1e-9, 1e9), Resumable] = 10.0
    """Epochs between checkpoints."""
    keep: Annotated[int, Range(1, 1e6), Resumable] = 2
    """Checkpoints kept, besides the best."""
    log_every: Annotated[Count, Resumable] = 10
    """Batches between lines of metrics.jsonl."""
    timeout_s: Annotated[float, Range(1, 1e6), Resumable] = 600.0
    """Seconds that a process waits for the others before it gives them up."""
    trace: Annotated[int, Range(0, 1e6), Resumable] = 0
    """Batches, after the first ten, that torch.profiler records to RUN/trace (open in Perfetto); 0 is off."""
    threads: Annotated[int, Range(0, 4096), Resumable] = 0
    """CPU threads per process; 0 shares the cores among the local processes."""
    report: Annotated[bool, Resumable] = True
    """Whether the launcher writes OUTPUT/report.html at the end."""
    tracker: Annotated[Literal["tensorboard", "wandb", "none"], Resumable] = "tensorboard"
    """Where metrics go beside metrics.jsonl."""


@dataclass
class EvalConfig:
    """How two items are compared, and evaluation (docs/scoring.md)."""

    objective: Annotated[Literal["auto", "class", "pair", "both"], Resumable] = "auto"
    """What the model's vectors are made for: to find items of the same class (class, by MAP), a query's own partner
    (pair, by Recall@10), or both. auto: both with labels, else pair."""
    score: Annotated[Literal["auto", "cosine", "zscore", "posterior"], Resumable] = "auto"
    """auto: a mixture of class posteriors, cosine of common representations and pair head, chosen on validation when
    training ends. Else one alone: cosine, z-scored cosine (by the training split) or class posteriors."""
    pair_head: Annotated[bool, Resumable] = True
    """auto: fit a linear map of the features to the pairs when training ends (CCA, then InfoNCE), for validation to
    choose."""
    class_head: Annotated[bool, Resumable] = True
    """auto: fit a kernel classifier of the features a modality when training ends, for validation to mix with the
    network's class posteriors."""
    bank: Annotated[int, Range(0, 100_000), Resumable] = 2000
    """auto: training items a modality against which items that are everybody's neighbours are marked down (QB-Norm),
    where validation gains by it; 0 is off."""
    batch: Annotated[Count, Resumable] = 256
    """Samples embedded at a time."""


DATA_SEPARATOR = "\n"
"""Between several data sets in Config.data: a comma may stand in paths and URLs."""


@dataclass
class Config:
    """A whole run."""

    preset: Annotated[str, Resumable] = "reference"
    """Preset to start from: reference, paper, features, openmoji, wikipedia, pairs, raw or smoke."""
    data: Annotated[str, Resumable] = ""
    """Folder or URL of shards with manifest.json; several, each behind a --data of its own, are mixed
    (stream.weights). Here they stand in one text, a line each."""
    output: Annotated[str, Resumable] = ""
    """Folder of the run: config, metrics, checkpoints, report."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def micro_batch(config: Config) -> int:
    """Return the samples that all processes together take in one pass: stream.global_batch / optim.accumulate."""
    return config.stream.global_batch // config.optim.accumulate


def resolved_streams(stream: StreamConfig) -> int:
    """Return S, the number of logical streams."""
    return stream.logical_streams or math.gcd(stream.global_batch, 48)
