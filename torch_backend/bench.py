"""What `horovod-lm bench` measures the backend against: peers, bare products, an allreduce."""

from __future__ import annotations

import atexit
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from horovod_lm.backend import EngineSettings, EngineState, Loss, MicroBatch, Precision
from horovod_lm.bench.tools import Peer, Product
from horovod_lm.config import Config
from horovod_lm.optimizers import KEYS
from horovod_lm.randomness import initial_weights
from horovod_lm.spec import ModelSpec
from torch_backend.communicator import Communicator
from torch_backend.engine import Engine
from torch_backend.precision import FULL_TYPES, HALF_TYPES

TRIALS = 3  # of each form of a product, to see which is the fastest here


class BenchTools:
    """See `horovod_lm.bench.tools.BenchTools`."""

    def peer(self, name: str, config: Config, threads: int) -> Peer:
        """The peer `name`, with new weights."""
        if name in _DISTRIBUTED:
            return _DISTRIBUTED[name](config)
        make = _hugging_face if name.startswith("huggingface") else _Plain
        model = make(config.model).to(_device()).train()
        return _Peer(torch.compile(model) if name.endswith("compile") else model, config)

    def product_libraries(self, precision: Precision) -> Sequence[str]:
        """torch's own products, and oneDNN's where another library (MKL) makes those."""
        onednn = precision == "fp32" and torch.backends.mkl.is_available()
        return (
            ("torch", "oneDNN") if onednn and torch.backends.mkldnn.is_available() else ("torch",)
        )

    def products(
        self, library: str, products: Sequence[Product], precision: Precision
    ) -> Callable[[], None]:
        """A function that does all products and their gradients, each in its fastest form."""
        kind, device = HALF_TYPES[precision] or FULL_TYPES[precision], _device()
        calls = []
        for product in products:
            rows, inputs, outputs = product.rows, product.inputs, product.outputs
            x = torch.randn(rows, inputs, dtype=kind, device=device)
            k = torch.randn(inputs, outputs, dtype=kind, device=device)
            g = torch.randn(rows, outputs, dtype=kind, device=device)
            forms = _onednn_forms(x, k, g) if library == "oneDNN" else _torch_forms(x, k, g)
            calls += [_fastest(form) for form in forms] * product.times

        def run() -> None:
            for call in calls:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    def copy(self, elements: int) -> Callable[[], None]:
        """A function that reads a tensor of `elements` fp32 and writes another."""
        source, target = (torch.zeros(elements, device=_device()) for _ in range(2))

        def run() -> None:
            target.copy_(source)
            if source.is_cuda:
                torch.cuda.synchronize()

        return run

    def allreduce(self, communicator: Communicator, elements: int) -> Callable[[], None]:
        """A function that sums a buffer of `elements` fp32 as the engine does its gradients."""
        buffer = torch.zeros(elements, device=_device())
        return lambda: communicator.reduce_in_place(buffer)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Peer:
    """A module from ids (B, L) and targets to the loss, trained as its users do."""

    rank, size = 0, 1

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._model, self._max_norm = model, config.train.max_norm
        self._half = HALF_TYPES[config.train.precision]
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        settings = config.optimizer
        # What Hugging Face's Trainer chooses by itself; `foreach` is as fast within noise.
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )

    def step(self, tokens: np.ndarray) -> float:
        """One training step; the loss."""
        ids = torch.from_numpy(tokens).long().to(_device())
        half = self._half
        with nullcontext() if half is None else torch.autocast(ids.device.type, half):
            loss = self._model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def broadcast(self, data: bytes) -> bytes:
        """There is one rank only."""
        return data


class _Ranks:
    """The ranks that torchrun started, over Gloo."""

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        atexit.register(self._leave)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0."""
        box = [data]
        dist.broadcast_object_list(box)
        return box[0]

    def _leave(self) -> None:
        # Gloo's threads may hold tensors of the last step, and to free one when Python has ended
        # aborts the process. They end with the group, which the model holds too, as would the
        # defaults of functions in torch.distributed.nn if it were first imported by DDP.
        vars(self).clear()
        gc.collect()
        dist.destroy_process_group()


class _PlainDistributed(_Ranks, _Peer):
    """The plain model in DistributedDataParallel."""

    def __init__(self, config: Config) -> None:
        _Ranks.__init__(self)
        _Peer.__init__(self, DistributedDataParallel(_Plain(config.model)), config)


class _Wrapped(DistributedDataParallel):
    """Our model, which its engine also asks for more than `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.half = model.half  # the type of products, where a module has a method

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class _OwnDistributed(_Ranks):
    """Our own engine on each rank, but with DistributedDataParallel to reduce the gradients."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        train, optimizer = config.train, config.optimizer
        settings = EngineSettings(
            precision=train.precision,
            seed=train.seed,
            dropout_generator=train.dropout_generator,
            **{key: getattr(optimizer, key) for key in KEYS["adamw"]},
        )
        self._rate, self._max_norm = optimizer.learning_rate, train.max_norm
        # The engine takes itself for the only rank: its sum over ranks is what DDP has left it.
        alone = SimpleNamespace(rank=0, size=1, reduce_in_place=lambda buffer: None)
        self._engine = Engine(config.model, settings, alone, torch.device("cpu"))
        self._engine.load_state(EngineState(initial_weights(config.model, train.seed)))
        self._engine.model = _Wrapped(self._engine.model)
        self._step = 0

    def step(self, tokens: np.ndarray) -> float:
        """One training step; the loss of this rank."""
        targets = np.ascontiguousarray(tokens[:, 1:])
        weights = np.ones(targets.shape, np.float32)
        # DDP takes the mean over ranks, which all have as many targets.
        loss = Loss("lm", "lm", targets, weights, normaliser=float(targets.size))
        rows = np.arange(len(tokens), dtype=np.int64) + self.rank * len(tokens)
        self._engine.forward_backward(
            MicroBatch({"tokens": tokens[:, :-1]}, rows, (loss,)), self._step, 1.0
        )
        reduced = self._engine.reduce_gradients()
        self._engine.apply_gradients(self._rate, self._max_norm)
        self._step += 1
        return reduced.losses["lm"]


_DISTRIBUTED = {"ddp": _PlainDistributed, "ddp-own": _OwnDistributed}


def _hugging_face(spec: ModelSpec) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    class HuggingFace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=spec.vocabulary,
                    n_positions=spec.context,
                    n_embd=spec.width,
                    n_layer=spec.layers,
                    n_head=spec.heads,
                    n_inner=spec.inner_width,
                    activation_function={"gelu_tanh": "gelu_pytorch_tanh"}.get(
                        spec.activation, spec.activation
                    ),
                    embd_pdrop=spec.dropout,
                    resid_pdrop=spec.dropout,
                    attn_pdrop=spec.attention_dropout,
                    layer_norm_epsilon=spec.norm_epsilon,
                    bos_token_id=0,
                    eos_token_id=0,
                    use_cache=False,  # of decoding
                )
            )

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # It shifts labels itself, so that the ids are their own; one target in L is lost.
            return self.model(input_ids=ids, labels=ids).loss

    return HuggingFace()


class _PlainBlock(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = nn.LayerNorm(spec.width, spec.norm_epsilon)
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.output = nn.Linear(spec.width, spec.width)
        self.feed_forward_norm = nn.LayerNorm(spec.width, spec.norm_epsilon)
        self.up = nn.Linear(spec.width, spec.inner_width)
        self.down = nn.Linear(spec.inner_width, spec.width)
        self.activation = {
            "gelu": nn.GELU(),
            "gelu_tanh": nn.GELU("tanh"),
            "relu": nn.ReLU(),
        }[spec.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, (batch, length, width) = self.spec, x.shape
        query, key, value = (
            part.view(batch, length, spec.heads, spec.head_width).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, -1)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=spec.attention_dropout, is_causal=True
        )
        branch = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(branch, spec.dropout)
        branch = self.down(self.activation(self.up(self.feed_forward_norm(x))))
        return x + F.dropout(branch, spec.dropout)


class _Plain(nn.Module):
    """The Transformer as anyone would write it in torch, after nanoGPT."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = nn.Embedding(spec.vocabulary, spec.width)
        self.positions = nn.Embedding(spec.context, spec.width)
        self.blocks = nn.ModuleList(_PlainBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, spec.norm_epsilon)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, spec.initial_std)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = F.dropout(self.tokens(ids) + self.positions(positions), self.spec.dropout)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Form = Callable[[], object]


def _torch_forms(x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> list[list[Form]]:
    """For the product and its two gradients, the same with either layout of the kernel."""
    y, dx, kt = torch.empty_like(g), torch.empty_like(x), k.t().contiguous()
    dk, dkt = torch.empty_like(k), torch.empty_like(kt)
    return [
        [lambda: torch.mm(x, k, out=y), lambda: torch.mm(x, kt.t(), out=y)],
        [lambda: torch.mm(g, k.t(), out=dx), lambda: torch.mm(g, kt, out=dx)],
        [lambda: torch.mm(x.t(), g, out=dk), lambda: torch.mm(g.t(), x, out=dkt)],
    ]


def _onednn_forms(x: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> list[list[Form]]:
    """The same by oneDNN, whose inputs must lie as it likes them to be fast."""

    def product(a: torch.Tensor, b: torch.Tensor) -> Form:
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    kt, xt, gt = (tensor.t().contiguous() for tensor in (k, x, g))
    return [[product(x, kt)], [product(g, k)], [product(xt, gt), product(gt, xt)]]


def _fastest(forms: Sequence[Form]) -> Form:
    """The one that takes the least time here."""

    def seconds(form: Form) -> float:
        form()
        begin = time.perf_counter()
        for _ in range(TRIALS):
            form()
        return time.perf_counter() - begin

    return min(forms, key=seconds)
