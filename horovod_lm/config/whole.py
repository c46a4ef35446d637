"""The configuration of a whole run: its sections, what they ask of each other, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from horovod_lm.config.sections import (
    Batching,
    Checkpoints,
    Data,
    Evaluation,
    Launch,
    LossScale,
    Objective,
    Optimizer,
    Output,
    Schedule,
    Section,
    Train,
)
from horovod_lm.errors import UserError
from horovod_lm.objectives.options import NEEDS
from horovod_lm.presets import preset
from horovod_lm.spec import ModelSpec

MOST_PROFILED = 50  # steps; viewers can't open much more


class Config(Section):
    """A whole run. `model.vocabulary` follows `data.vocabulary`, so it is not set apart; and
    `model.preset` names the values that the other keys of `model` have by default."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9._-]{1,80}$",
        description="of 1 to 80 letters, digits, dots, hyphens and underscores",
    )
    model: ModelSpec = ModelSpec()
    data: Data = Data()
    batching: Batching = Batching()
    objective: tuple[Objective, ...] = Field(
        (), strict=False, description="the [[objective]] tables; none: causal_lm"
    )
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss_scale: LossScale = LossScale()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    output: Output = Output()
    launch: Launch = Launch()

    @model_validator(mode="before")
    @classmethod
    def _plain_model(cls, values: Any) -> Any:
        """The fields of `model.preset` in its place, and one vocabulary."""
        if not isinstance(values, Mapping):
            return values
        model, data = values.get("model", {}), values.get("data", {})
        if not isinstance(model, Mapping):
            return values
        fields = _preset_fields(model)
        usual = fields.pop("vocabulary", 8192)
        own = {key: value for key, value in model.items() if key != "preset"}
        wanted = data.get("vocabulary", usual) if isinstance(data, Mapping) else None
        if not isinstance(wanted, int) or isinstance(wanted, bool):  # a fault of [data] alone
            return {**values, "model": {**fields, **own}}
        if model.get("vocabulary", wanted) != wanted:
            raise ValueError(
                f"model.vocabulary = {model['vocabulary']} differs from data.vocabulary = "
                f"{wanted}; set data.vocabulary alone"
            )
        return {
            **values,
            "model": {**fields, **own, "vocabulary": wanted},
            "data": {**data, "vocabulary": wanted},
        }

    @model_validator(mode="before")
    @classmethod
    def _heads_of_objectives(cls, values: Any) -> Any:
        """The model gets the head of each objective over sequences that it has not got."""
        tables = values.get("objective", ()) if isinstance(values, Mapping) else ()
        model = values.get("model", {}) if isinstance(values, Mapping) else {}
        if not isinstance(tables, list | tuple) or not isinstance(model, Mapping):
            return values
        heads = model.get("task_heads", ())
        if not isinstance(heads, list | tuple):
            return values
        names = {head.get("name") for head in heads if isinstance(head, Mapping)}
        wanted = [str(table.get("name")) for table in tables if isinstance(table, Mapping)]
        new = [
            {"name": name, "outputs": NEEDS[name].outputs}
            for name in dict.fromkeys(wanted)
            if name in NEEDS and NEEDS[name].outputs and name not in names
        ]
        if not new:
            return values
        return {**values, "model": {**model, "task_heads": [*heads, *new]}}

    @model_validator(mode="after")
    def _objectives_fit(self) -> Config:
        names = [table.loss_name for table in self.objective]
        heads = {head.name: head for head in self.model.task_heads}
        for table in self.objective:
            needs, name = NEEDS[table.name], table.loss_name
            fault = None
            if names.count(name) > 1:
                fault = f'two have a loss "{name}"; give one of them another loss = NAME'
            elif self.model.kind != needs.kind:
                fault = (
                    f'it needs model.kind = "{needs.kind}", not "{self.model.kind}"; change the '
                    "kind, or the objective"
                )
            elif needs.outputs and (
                (heads[table.name].outputs, heads[table.name].over) != (needs.outputs, "sequence")
            ):
                fault = (
                    f"its head in model.task_heads must have outputs = {needs.outputs} over "
                    "sequence; leave the head out, and it is added"
                )
            elif self.batching.kind == "packed" and not needs.packed:
                fault = (
                    "its examples can't share a row, whose first token is judged; set "
                    'batching.kind = "windows" or "buckets"'
                )
            elif table.on is not None and not self._carries(table.on):
                fault = f'on = "{table.on}" must be the loss of a next_sentence or sentence_order'
            if fault:
                raise ValueError(f"objective {table.name}: {fault}")
        riders = [table.on for table in self.objective if table.on is not None]
        if len(riders) != len(set(riders)):
            raise ValueError("objective: two work on the same rows; one may")
        return self

    def _carries(self, loss: str) -> bool:
        return any(t.loss_name == loss and NEEDS[t.name].outputs for t in self.objective)

    @model_validator(mode="after")
    def _profiled_in_the_run(self) -> Config:
        steps = self.output.profiled
        if self.output.profile is None:
            return self
        first, last, most = steps.start, steps.stop - 1, self.train.steps
        if not (2 <= first <= last <= most) or len(steps) > MOST_PROFILED:
            raise ValueError(
                f"output.profile = {self.output.profile} must be FIRST:LAST of at most "
                f"{MOST_PROFILED} steps, from the second (the first one compiles) to train.steps = "
                f"{most}, as in {max(2, most - 3)}:{max(2, most - 1)}"
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run: all but `launch`, `output`, `data.workers` and the name."""
        # However many processes tokenise, the same data comes out.
        apart: Any = {"launch": True, "output": True, "name": True, "data": {"workers"}}
        return self.model_dump(mode="json", exclude=apart)

    @property
    def flat(self) -> dict[str, Any]:
        """`identity` by `section.key`; the tables of objectives are one value."""
        return flatten(self.identity)

    @property
    def digest(self) -> str:
        """SHA-256 of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def trajectory(self) -> dict[str, Any]:
        """The part of `identity` that decides which weights come out, flat, as `section.key`: a
        resumed run must not change it.

        Left out are evaluation, checkpoints, comparisons of replicas, keys that the optimizer does
        not read, the micro-batch size and recomputation (which change memory, not results).
        `train.steps` counts only where the schedule ends with it: then it stands as
        `schedule.updates`.
        """
        values = {
            key: value
            for key, value in self.flat.items()
            if not key.startswith(("evaluation.", "checkpoint."))
        }
        steps = values.pop("train.steps")
        unread = [f"optimizer.{key}" for key in self.optimizer.unread]
        for key in ("train.check_every", "train.micro_batch_size", "train.recompute", *unread):
            del values[key]
        ends = self.schedule.name in ("cosine", "linear")
        values["schedule.updates"] = (self.schedule.updates or steps) if ends else None
        return values


def _preset_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the fields of the preset that section `model` names, if it does."""
    name = model.get("preset")
    if name is None:
        return {}
    try:
        return dict(preset(str(name)).fields)
    except UserError as error:
        raise ValueError(f"model.preset: {error}") from None


def flatten(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of the sections by `section.key`; what is no section is one value."""
    values: dict[str, Any] = {}
    for section, keys in sections.items():
        if isinstance(keys, Mapping):
            values |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            values[section] = keys
    return values


def known_keys() -> list[str]:
    """Every key that a config may have, as `section.key`."""
    keys = ["model.preset"]
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys
