"""Training: one loop over optimizer steps, the same on one process or many.

Batches, learning rates and the decay of the moving average are functions of the step, and a checkpoint holds everything
else, so that a run that was stopped ends with the same weights as one that was not.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fusekern import recipes
from fusekern.config import Recipe
from fusekern.data.sampler import train_loader
from fusekern.engine import assemble, optim, run_folder
from fusekern.engine import checkpoint as checkpoints
from fusekern.engine.checkpoint import Checkpoint
from fusekern.engine.distributed import any_rank, broadcast_buffers, broadcast_files, gather_tensor, gather_text
from fusekern.engine.evaluate import evaluate
from fusekern.engine.predict import check_protocol
from fusekern.engine.reports import Reports
from fusekern.engine.signals import Interrupted, StopSignals, leave_signals_to_trainer
from fusekern.errors import FusekernError
from fusekern.models.segmenter import Segmenter

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, out: str | Path, resume: str | None = None, init: str | None = None) -> Path:
    """Trains a segmenter into a run folder; under ``torchrun``, as one of its processes.

    Args:
        recipe: the recipe; ``train.batch`` is the global batch.
        out: run folder; it must not exist or be empty, unless ``resume`` is given.
        resume: ``auto`` goes on from the last checkpoint in ``out``, or begins where there is none; else the path of a
            checkpoint.
        init: safetensors file, checkpoint or run folder to take the initial weights from, and nothing else.

    Returns:
        The last checkpoint's folder.

    Raises:
        FusekernError: bad recipe, data, folder or checkpoint; a loss that is not finite; no space left.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    cuda, out = torch.cuda.is_available(), Path(out)
    _check(recipe, resume, init, cuda)
    deterministic = recipe.train.deterministic and cuda
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
    # DDP regroups gradients after the first step of a run, a resumed one's too, and over more than two processes the
    # grouping decides the order of additions. Looking for unused parameters, of which there are none, prevents that.
    keep_groups = (deterministic or not cuda) and int(os.environ.get("WORLD_SIZE", "1")) > 2
    accelerator = Accelerator(
        mixed_precision="no" if recipe.train.precision == "fp32" else recipe.train.precision,
        cpu=not cuda,
        log_with="tensorboard",
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=keep_groups)],
    )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or deterministic)
    main = accelerator.is_main_process
    try:
        with run_folder.console_log(visible=main) as early:
            run = _Run(recipe, out, accelerator, *_find_start(recipe, out, resume, init, accelerator))
            if run.step == recipe.train.steps:
                log.info("the run has ended already, after %d steps: nothing is left to do", run.step)
                return run.source
            with run_folder.open_run(out, recipe, run.step, early) if main else nullcontext(), StopSignals() as signals:
                return run.loop(signals)
    except OSError as error:
        if checkpoints.is_disk_full(error):
            raise FusekernError(f"{out}: no space left ({error}); make room and go on with --resume auto") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # else this process could train at one precision only


def _check(recipe: Recipe, resume: str | None, init: str | None, cuda: bool) -> None:
    if resume and init:
        raise FusekernError("--resume and --init exclude each other: a resumed run has its weights from the checkpoint")
    recipes.check(recipe)
    if recipe.train.precision == "fp16" and not cuda:
        raise FusekernError("train.precision fp16 needs CUDA, and there is none here: use bf16 or fp32")
    check_protocol(recipe.eval)
    if recipe.eval.weights == "ema" and recipe.train.ema is None:
        raise FusekernError("eval.weights is ema, but train.ema is off: there is no moving average to evaluate")


def _find_start(
    recipe: Recipe, out: Path, resume: str | None, init: str | None, accelerator: Accelerator
) -> tuple[Checkpoint | None, tuple[Path, dict[str, Tensor]] | None]:
    """The checkpoint to go on from, and the file and tensors of ``init``.

    Rank 0 reads and sends them, or its error, to the others, whose machines need not see the run folder.
    """
    files = None
    if accelerator.is_main_process:
        try:
            path = run_folder.choose_start(out, recipe, resume)
            files = checkpoints.read(path) if path else {}
            if init:
                path, files["init"] = checkpoints.read_weights(Path(init))
            files["path"] = str(path).encode()
        except FusekernError as error:
            files = {"error": str(error).encode()}
    files = broadcast_files(files, device=accelerator.device)
    if "error" in files:
        raise FusekernError(files["error"].decode())
    path = Path(files.pop("path").decode())
    if init:
        return None, (path, checkpoints.parse_tensors(files["init"], path))
    if not files:
        return None, None
    checkpoint = checkpoints.decode(files, path)
    run_folder.refuse_differences(checkpoint.state["recipe"], recipe, str(path))
    return checkpoint, None


class _Round(NamedTuple):
    """One micro-batch, forward and backward: its losses, without gradient, and the names of its images."""

    losses: dict[str, Tensor]
    names: list[str]

    @property
    def finite(self) -> bool:
        return bool(torch.stack([*self.losses.values()]).isfinite().all())

    def __str__(self) -> str:
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in self.losses.items())
        return f"{values} on the images {', '.join(self.names)}"


class _Forward(nn.Module):
    """What accelerate wraps: its autocast stays off the segmenter itself, which is evaluated as ``eval`` says."""

    def __init__(self, model: Segmenter):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple:
        return self.model(image)


class _Run:
    """A training run: the attributes are its state, ``loop`` advances it, ``_save`` writes it."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None,
        initial: tuple[Path, dict[str, Tensor]] | None,
    ):
        self.recipe, self.out, self.accelerator = recipe, out, accelerator
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.data = assemble.open_data(recipe, accelerator)
        self.step, self.source, self.rng = 0, None, {}
        self.score = {"last": None, "best": None, "best_step": None}
        if checkpoint:
            self.step, self.source, self.rng = checkpoint.state["step"], checkpoint.path, checkpoint.rng
            self.score = checkpoint.state["score"]
            assemble.refuse_other_data(checkpoint, self.data, world=self.world, device=self.device.type)
        self.loader = self._loader()
        self.text = assemble.embed(recipe, self.data.spec, checkpoint)
        model = assemble.build_model(recipe, self.data.spec, self.text, checkpoint, initial)
        self.model = assemble.place(model, accelerator)
        self.ema = assemble.average(self.model, recipe, checkpoint)
        self.optimizer, self.backbone_mult = assemble.make_optimizer(
            self.model, recipe, checkpoint, trained=initial is not None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a newer name in torch 2.15
            self.forward, self.stepper = accelerator.prepare(_Forward(self.model), self.optimizer)
        if checkpoint:
            file = checkpoint.path / "optimizer.safetensors"
            optim.load_optimizer(self.model, self.optimizer, checkpoint.optimizer, file)
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def loop(self, signals: StopSignals) -> Path:
        """Trains to the end. Returns the last checkpoint."""
        settings = self.recipe.train
        reports = Reports(self.out, self.accelerator, settings, self.text, self.step, self.score)
        self._describe()
        micro_batches = iter(self.loader)
        self._seed()
        batches, failure = self._read(micro_batches)
        (unread,) = any_rank(bool(failure), device=self.device)
        if unread:
            raise FusekernError(self._why_unread(failure))
        with reports.bar:
            while self.step < settings.steps:
                rate = optim.set_learning_rate(self.optimizer, self.step, self.recipe.optim, steps=settings.steps)
                self.stepper.zero_grad()
                rounds = [self._round(batch, turn) for turn, batch in enumerate(batches)]
                last = self.step + 1 == settings.steps
                batches, failure = ([], "") if last else self._read(micro_batches)  # of the next step
                finite = all(part.finite for part in rounds)
                broken, stop, unread = any_rank(not finite, signals.requested, bool(failure), device=self.device)
                if broken:
                    self._refuse_to_go_on(rounds)
                norm = self._update()
                reports.add([part.losses for part in rounds])
                if self._due(settings.log_every):
                    reports.step(self.step, rate, norm, self.tokens)
                if stop and self.step < settings.steps:
                    raise Interrupted(self.step, self._save())
                if unread:
                    raise FusekernError(self._why_unread(failure, self._save()))
                with reports.paused():
                    evaluating = self.data.val is not None and self._due(settings.eval_every)
                    if evaluating or self._due(settings.save_every):
                        path = self._save()  # before the evaluation, which a bad file can end
                    if evaluating:
                        self._evaluate(reports, path, signals)
        return path

    def _read(self, micro_batches: Iterator[dict]) -> tuple[list[dict], str]:
        """The micro-batches of a step, or why they cannot be read."""
        try:
            return list(islice(micro_batches, self.recipe.train.accumulate)), ""
        except FusekernError as error:
            return [], str(error)

    def _why_unread(self, failure: str, saved: Path | None = None) -> str:
        found = "; ".join(filter(None, gather_text(failure, device=self.device)))
        rest = (
            f"; the steps before it are saved in {saved}: mend the file and go on with --resume auto" if saved else ""
        )
        return f"{found} (needed by step {self.step + 1}{rest})"

    def _due(self, every: int) -> bool:
        return self.step == self.recipe.train.steps or (every > 0 and self.step % every == 0)

    def _describe(self) -> None:
        settings, val, warmup = self.recipe.train, self.data.val, self.recipe.optim.warmup
        log.info(
            "%s at step %d of %d on %d x %s, %s; batch %d = %d processes x %d rounds x %d images",
            *(f"resuming {self.source}" if self.source else "starting", self.step, settings.steps),
            *(self.world, self.device.type, settings.precision, settings.batch, self.world, settings.accumulate),
            settings.batch // (self.world * settings.accumulate),
        )
        log.info(
            "data set %s: %d training images, %s; %d classes, text: %s",
            *(self.data.spec.name, len(self.data.train)),
            f"{len(val)} validation images" if val else "no val split, so no evaluation",
            *(len(self.data.spec.names), self.text.describe() if self.text else "none"),
        )
        if warmup >= settings.steps:
            log.warning(
                "optim.warmup %d is not below train.steps %d: the learning rate never reaches optim.lr",
                *(warmup, settings.steps),
            )

    def _loader(self) -> DataLoader:
        loader = train_loader(
            self.data.train,
            self.recipe.data,
            batch=self.recipe.train.batch,
            accumulate=self.recipe.train.accumulate,
            seed=self.recipe.train.seed,
            first_step=self.step,
            last_step=self.recipe.train.steps,
            rank=self.rank,
            world=self.world,
        )
        loader.worker_init_fn = leave_signals_to_trainer
        return loader

    def _seed(self) -> None:
        """Sets the random numbers that dropout draws, each process its own."""
        torch.manual_seed(self.recipe.train.seed + self.rank)
        if self.rng:
            torch.set_rng_state(self.rng[f"rank{self.rank}.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.rng[f"rank{self.rank}.cuda"], self.device)

    def _round(self, batch: dict, turn: int) -> _Round:
        """Adds the gradients of one micro-batch; the last of a step also averages them over the processes."""
        image = batch["image"].to(self.device, memory_format=torch.channels_last, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True)
        last = turn == self.recipe.train.accumulate - 1
        with nullcontext() if last else self.accelerator.no_sync(self.forward):
            output = self.forward(image)
            losses = self.model.loss(output, label)
            self.accelerator.backward(sum(losses.values()) / self.recipe.train.accumulate)
        self.tokens = None if output.text is None else output.text.detach()
        return _Round({name: loss.detach() for name, loss in losses.items()}, batch["names"])

    def _refuse_to_go_on(self, rounds: list[_Round]) -> None:
        own = "; ".join(str(part) for part in rounds if not part.finite)
        found = "; ".join(text for text in gather_text(own, device=self.device) if text)
        raise FusekernError(
            f"step {self.step + 1}: the loss is not finite: {found}. The step changed no weight, and earlier "
            "checkpoints are sound, if there are any: look at these images with fusekern check-data, or lower optim.lr "
            "or set optim.clip in a new run, with --init CHECKPOINT"
        )

    def _update(self) -> Tensor | None:
        """The optimizer step and the moving average. Returns the gradient norm, where it is clipped."""
        clip = self.recipe.optim.clip
        norm = None if clip is None else self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        self.stepper.step()
        self.step += 1
        if self.ema:
            broadcast_buffers(self.model.buffers())
            self.ema.update(self.model, step=self.step)
        return norm

    def _evaluate(self, reports: Reports, saved: Path, signals: StopSignals) -> None:
        """Scores the weights, which ``saved`` holds; a signal ends it early."""
        averaged = self.ema is not None and self.recipe.eval.weights != "model"
        matrix = evaluate(
            self.ema.module if averaged else self.model,
            self.data.val,
            self.recipe.eval,
            device=self.device,
            rank=self.rank,
            world=self.world,
            stop=lambda: signals.requested,
        )
        (stopped,) = any_rank(signals.requested, device=self.device)
        if stopped:
            raise Interrupted(self.step, saved, ended=self.step == self.recipe.train.steps)
        reports.evaluation(self.step, matrix, "ema" if averaged else "model")
        if self.rank == 0:
            checkpoints.set_score(saved, self.score)

    def _save(self) -> Path:
        """Writes a checkpoint from rank 0, with the random states of all. Returns its folder."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FusekernError(f"after step {self.step} weights are not finite, so they are not saved: lower optim.lr")
        broadcast_buffers(self.model.buffers())
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        rng = {
            f"rank{rank}.{kind}": state
            for kind, own in states.items()
            for rank, state in enumerate(gather_tensor(own, device=self.device))
        }
        tensors = {"model": self.model.state_dict(), "rng": rng}
        tensors["optimizer"] = optim.optimizer_tensors(self.model, self.optimizer)
        if self.ema:
            tensors["ema"] = self.ema.module.state_dict()
        scaler, text = self.accelerator.scaler, self.text
        state = {
            "world": self.world,
            "device": self.device.type,
            **assemble.surroundings(),
            "recipe": recipes.to_dict(self.recipe),
            "backbone_mult": self.backbone_mult,
            "dataset": checkpoints.spec_to_dict(self.data.spec),
            "images": self.data.images,
            "text": text and {"source": text.source, "language_prior": text.language_prior},
            "score": self.score,
            "scaler": scaler and scaler.state_dict(),
        }
        failure = ""
        if self.rank == 0:
            try:
                checkpoints.save(self.out, self.step, state=state, tensors=tensors, keep=self.recipe.train.keep)
                log.info("step %d/%d  saved", self.step, self.recipe.train.steps)
            except FusekernError as error:
                failure = str(error)
        # All wait here: one that ended early would make torchrun end the one that writes.
        if failure := gather_text(failure, device=self.device)[0]:
            raise FusekernError(failure)
        return checkpoints.folder_of(self.out, self.step)
