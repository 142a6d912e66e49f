"""Every setting of a run: dataclasses with a docstring under each field, validated once, dumped beside the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

CONFIG_NAME = "config.yaml"


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
    global_batch: int = 64
    """Samples per update over all ranks together."""
    logical_streams: int = 0
    """S: parts into which an epoch is cut, whatever the world size. A multiple of the world size and a divisor of
    global_batch. 0: the largest common divisor of global_batch and 48."""
    window: int = 8
    """Shards of a logical stream whose samples are shuffled together."""
    workers: int = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    augment: bool = True
    """Random resized crop and flip of training images, seeded by position. Features are never augmented."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the samples read is unusable."""
    weights: tuple[float, ...] = ()
    """Mixture: share of each data set in --data A,B,C; empty goes by their numbers of samples."""
    cache: str = ""
    """Folder on local disk for shards of http(s), s3 and gs URLs; "" is cmgan_dist/shards in the user's cache."""
    cache_gib: float = 32.0
    """Largest size of that folder in GiB. It should hold two windows of every logical stream on the node."""
    retries: int = 4
    """Further tries when a remote source fails, with growing waits between."""
    timeout_s: float = 30.0
    """Seconds to connect to a remote source, and to wait for its next byte."""


@dataclass
class ImageBackboneConfig:
    """What turns an image into a feature vector."""

    name: str = "features"
    """"features" (precomputed in the shards) or any timm model, such as tf_efficientnet_lite0 or vgg19."""
    weights: str = ""
    """"" random, "hub" timm's download, a .pth or .safetensors file, or "package:NAME" for weights in a package."""
    trainable: bool = False
    """Fine-tune it with the generator; else it is frozen and in eval mode."""
    checkpoint: bool = False
    """Trained: keep few activations and compute the others again in the backward pass: less memory, a third slower."""
    image_size: int = 224
    """Side of the square input in pixels."""


@dataclass
class TextBackboneConfig:
    """What turns a text into a feature vector."""

    name: str = "features"
    """"features" (precomputed), "cnn" (Kim 2014) or "sentence" (a sentence-transformers model)."""
    weights: str = ""
    """sentence: a folder, "hub:NAME" or "package:NAME". cnn: a word2vec or GloVe file, or "" for random words."""
    trainable: bool = False
    """Fine-tune it with the generator. The cnn's convolutions are always trained; false keeps word vectors that came
    from a file as they are."""
    checkpoint: bool = False
    """sentence, trained: keep few activations and compute the others again in the backward pass."""
    max_tokens: int = 64
    """Longer texts are cut."""
    word_dim: int = 300
    """cnn: word vector dimension."""
    kernel_sizes: tuple[int, ...] = (3, 4, 5)
    """cnn: widths of the convolutions in words."""
    channels: int = 100
    """cnn: channels per width."""
    dropout: float = 0.5
    """cnn: dropout of the sentence vector."""
    vocabulary_size: int = 50_000
    """cnn: words kept, most frequent first."""
    min_count: int = 1
    """cnn: rarer words become unknown."""


@dataclass
class ModelConfig:
    """Networks of generator and discriminators (recipe: Networks)."""

    image: ImageBackboneConfig = field(default_factory=ImageBackboneConfig)
    text: TextBackboneConfig = field(default_factory=TextBackboneConfig)
    hidden_dim: int = 1024
    """Width of the modality-specific encoder layer and of the decoder's hidden layer."""
    common_dim: int = 1024
    """E: dimension of the common space."""
    discriminator_dim: int = 512
    """Hidden width of the inter-modality discriminators."""
    share_layers: bool = True
    """Image and text share the second encoder layer; false is the ablation "not shared"."""
    share_classifier: bool = False
    """One classifier for both modalities."""
    input_norm: Literal["none", "batch", "l2"] = "none"
    """Features before the first layer: as they are, standardised per dimension by batch statistics, or unit length."""
    input_dropout: float = 0.0
    """Dropout of the (normalised) features at the encoder's input."""
    dropout: float = 0.0
    """Dropout after the encoder's first layer."""
    common_activation: bool = True
    """LeakyReLU after the shared layer's BatchNorm, as in the reference."""
    spectral_norm: bool = False
    """Spectral normalisation of the discriminators' linear layers (Miyato et al., ICLR 2018)."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """BatchNorm, LeakyReLU and dropout after each linear layer: "triton" fused on a GPU, "torch" one op after another,
    "auto" triton where it runs. The log says once which path was taken and why."""


@dataclass
class LossConfig:
    """Loss terms and their weights (recipe: Losses). A weight of 0 turns a term off."""

    adversarial: Literal["bce", "hinge", "wgan-gp"] = "bce"
    """Form of all adversarial losses."""
    mismatch: Literal["reference", "conditional"] = "reference"
    """Mismatched input of the inter-modality discriminators: (wrong common, wrong feature) as in the published code,
    or (wrong common, right feature)."""
    intra: float = 1.0
    """Generator: fool the intra-modality discriminators with reconstructions."""
    inter: float = 1.0
    """Generator: fool the inter-modality discriminators with the other modality's common representation."""
    classification: float = 1.0
    """Generator: classify common representations (softmax, or sigmoid per class for multi-label data)."""
    contrastive: float = 0.0
    """Generator: InfoNCE between the image and text common representations of a batch, both directions."""
    class_contrastive: float = 0.0
    """Generator: supervised contrastive term across modalities, positives share a class (Khosla et al., 2020)."""
    temperature: float = 0.07
    """Temperature of the contrastive term."""
    class_temperature: float = 0.2
    """Temperature of the class contrastive term."""
    label_smoothing: float = 0.0
    """Of the softmax classification."""
    r1: float = 0.0
    """Discriminators: R1 penalty on real input (Mescheder et al., ICML 2018), gamma / 2 * |grad|^2."""
    r1_every: int = 16
    """Batches between R1 steps (lazy regularisation); the penalty is scaled by it."""
    gradient_penalty: float = 10.0
    """wgan-gp: weight of the penalty."""


@dataclass
class OptimConfig:
    """Adam, its rates and their schedule."""

    generator_lr: float = 1e-3
    """Learning rate of the generator."""
    discriminator_lr: float = 1e-3
    """Learning rate of the four discriminators."""
    generator_beta1: float = 0.5
    """Adam's first-moment decay of the generator."""
    discriminator_beta1: float = 0.5
    """Adam's first-moment decay of the discriminators."""
    beta2: float = 0.999
    """Adam's second-moment decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the generator."""
    generator_steps: int = 5
    """Generator updates per batch, after one update of each discriminator."""
    update: Literal["alternate", "joint"] = "alternate"
    """alternate: image side, then text side, each with its own step (reference). joint: one step on both sides."""
    schedule: Literal["halve", "cosine", "constant"] = "halve"
    """halve: half the rate every halve_every epochs (reference). Counted in samples."""
    halve_every: float = 100.0
    """Epochs between halvings."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0."""
    clip: float = 0.0
    """Largest gradient norm per optimiser; 0 is off."""
    accumulate: int = 1
    """Parts that a batch is cut into, for batches that do not fit into memory: an update takes the mean gradient of
    its parts; BatchNorm statistics, negatives and mismatched samples are those of a part (over all processes)."""


@dataclass
class TrainConfig:
    """Length, precision, validation and checkpoints."""

    epochs: float = 1000.0
    """Length of the run in passes over the training split."""
    seed: int = 0
    """Of initialisation, order, dropout and draws."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast to bf16 or fp16 (losses and statistics stay fp32; fp16 with a loss scaler per optimiser)."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """In what gradients travel between processes; bf16 halves their bytes and rounds them."""
    compile: bool = False
    """torch.compile the networks: pays on GPUs with small batches, costs seconds to minutes at the start."""
    ema: float = 0.0
    """Decay per batch of an exponential moving average of the generator, used in evaluation; 0 is off."""
    val_every: float = 10.0
    """Epochs between validations; 0 validates at the end only."""
    save_every: float = 10.0
    """Epochs between checkpoints."""
    keep: int = 2
    """Checkpoints kept, besides the best."""
    log_every: int = 10
    """Batches between lines of metrics.jsonl."""
    timeout_s: float = 600.0
    """Seconds that a process waits for the others before it gives them up."""
    trace: int = 0
    """Batches, after the first ten, that torch.profiler records to RUN/trace (open in Perfetto); 0 is off."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores among the local processes."""
    report: bool = True
    """Write OUTPUT/report.html at the end."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go beside metrics.jsonl."""


@dataclass
class EvalConfig:
    """Evaluation (recipe: Evaluation)."""

    zscore: bool = True
    """Standardise common representations per modality over the evaluated set, as the authors do."""
    batch: int = 256
    """Samples embedded at a time."""


@dataclass
class Config:
    """A whole run."""

    preset: str = "reference"
    """Preset to start from: reference, features, openmoji, openmoji_tuned, wikipedia, wikipedia_tuned, pairs, raw or
    smoke."""
    data: str = ""
    """Folder or URL of shards with manifest.json; several with commas between are mixed (stream.weights)."""
    output: str = ""
    """Folder of the run: config, metrics, checkpoints, report."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ---------------------------------------------------------------------------------------------- validation


def micro_batch(config: Config) -> int:
    """Samples that all processes together take in one pass: stream.global_batch / optim.accumulate."""
    return config.stream.global_batch // config.optim.accumulate


def resolved_streams(stream: StreamConfig) -> int:
    """S, the number of logical streams."""
    return stream.logical_streams or math.gcd(stream.global_batch, 48)


# ---------------------------------------------------------------------------------------------- YAML
