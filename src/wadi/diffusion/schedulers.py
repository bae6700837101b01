"""Build diffusers schedulers for the teacher's many steps and the student's few, from the scheduler that came with the model.

With the student's scheduler, a plain pipeline call with ``num_inference_steps=1`` computes the student's step ``x0 = (x_t -
sigma eps) / alpha`` at ``t*``, without this package. For a variance-preserving schedule this is DDIM whose betas end at ``t*``.
For a rectified flow, ``x0 = x_t - sigma v``, it is an Euler step from ``sigma = t* / T`` to 0.

A student of ``N`` steps predicts ``x0``, adds noise for the next timestep, and predicts again. `LCMScheduler` and
`FlowMatchLCMScheduler` do this in a plain call with ``num_inference_steps=N``. They choose the timesteps by their own rule, so
a student can only have timesteps that follow it: evenly spaced ones, or for flows also ones in a constant ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from wadi.diffusion.process import Process, is_flow_config
from wadi.errors import WadiError, short_repr

# LCM mixes the input into the output with the weight c_skip = s^2 / ((k t)^2 + s^2), s = 1/2. This k makes it vanish.
TIMESTEP_SCALING = 1e6
LONGEST = 100_000  # timesteps; models have 1000
MOST_STEPS = 8  # of a student
# What moves the steps of a flow's sampler besides its shift. Exponential sigmas are not listed: students have them.
SPACING = ("shift_terminal", "use_karras_sigmas", "use_beta_sigmas")
# Schedulers of models that were distilled to a few steps. Such a model has no score at other timesteps.
DISTILLED = ("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")


def is_flow(scheduler: Any) -> bool:
    """Return whether ``scheduler`` is one of a rectified flow."""
    return is_flow_config(type(scheduler).__name__, scheduler.config)


def make_scheduler(config: dict[str, Any]) -> Any:
    """Return a scheduler built from its saved config.

    Raises:
        WadiError: if diffusers has no such class, or the class does not accept these settings.
    """
    import diffusers

    name = str(config.get("_class_name"))
    if not hasattr(diffusers, name):
        raise WadiError(f"The teacher's scheduler is {name}, which diffusers does not have. Save the pipeline with one it has.")
    length = config.get("num_train_timesteps", 1000)
    if not isinstance(length, int) or not 1 <= length <= LONGEST:
        raise WadiError(
            f"The teacher's scheduler has num_train_timesteps: {short_repr(length)}. Give a whole number from 1 to {LONGEST:,} "
            "in scheduler_config.json."
        )
    try:
        return getattr(diffusers, name).from_config(config)
    except Exception as error:  # each class raises its own type of error for a wrong setting
        raise WadiError(
            f"A {name} cannot be built from its config: {type(error).__name__}: {str(error)[:200]}. Compare "
            "scheduler_config.json with that of the original model."
        ) from error


def sampler(scheduler: Any, image_tokens: int) -> Any:
    """Return a new deterministic first-order sampler for a model's own schedule: DDIM, or Euler for a flow.

    A flow that came with Euler keeps every setting of it, so it takes the steps of a call of the pipeline; a shift by
    resolution is passed to its ``set_timesteps`` (`resolution_shift`). Where a network's prediction determines no image at the
    end of the schedule, the sampler starts before it.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    if is_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.num_train_timesteps,
            shift=flow_shift(config, image_tokens),
            **{name: config[name] for name in SPACING if config.get(name)},
        )
    process = Process.from_scheduler(scheduler)
    if process.last_determined < process.last_timestep:
        return _ddim_step(scheduler, process.last_determined)
    return DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)


def flow_shift(config: Any, image_tokens: int) -> float:
    """Return the shift ``s`` of a flow's schedule, ``sigma -> s sigma / (1 + (s - 1) sigma)``.

    Some schedules depend on the resolution: they use ``s = exp(mu)``, with ``mu`` linear in the number of ``image_tokens``.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    mu = resolution_shift(config, image_tokens)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def resolution_shift(config: Any, image_tokens: int) -> float:
    """Return ``mu``, which pipelines with ``use_dynamic_shifting`` pass to their scheduler: linear in ``image_tokens``.

    This is ``calculate_shift`` of the pipelines of diffusers.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(first + (last - first) * (image_tokens - low) / (high - low))


def even_sigmas(steps: int) -> list[float]:
    """Return sigmas evenly spaced from 1 to ``1 / steps``, which the calls of many flows pass to their scheduler."""
    return [1 - i / steps for i in range(steps)]


def one_step_scheduler(scheduler: Any, timestep: int) -> Any:
    """Return the scheduler of a student that generates at ``timestep``, built from its teacher's ``scheduler``.

    Its single step leads from ``timestep`` to ``x0``. See `timestep_of` for the inverse.

    Raises:
        WadiError: if the teacher's schedule has no such timestep.
    """
    last = Process.from_scheduler(scheduler).last_timestep
    if not 1 <= timestep <= last:
        raise WadiError(
            f"The student generates at timestep {timestep}, but its teacher's schedule ends at {last}. Give the teacher that "
            "the student was trained on."
        )
    return _flow_step(scheduler.config, timestep) if is_flow(scheduler) else _ddim_step(scheduler, timestep)


def student_scheduler(scheduler: Any, timesteps: Sequence[int]) -> Any:
    """Return the scheduler of a student that generates at ``timesteps``, built from its teacher's ``scheduler``.

    Raises:
        WadiError: if the teacher's schedule has no such timestep, or no scheduler of diffusers generates at exactly these. The
            message has the nearest timesteps that one generates at.
    """
    first, count = timesteps[0], len(timesteps)
    found = one_step_scheduler(scheduler, first)
    if count == 1:
        return found
    candidates = _flow_candidates(scheduler, timesteps) if is_flow(scheduler) else _lcm_candidates(scheduler, timesteps)
    for candidate in candidates:
        if _is_at(candidate, timesteps):
            return candidate
    last = Process.from_scheduler(scheduler).last_timestep if is_flow(scheduler) else first
    length = last if is_flow(scheduler) else last + 1
    near = [last - i * length // count for i in range(count)]
    rule = "evenly spaced from the flow's first timestep, or in a constant ratio" if is_flow(scheduler) else "evenly spaced"
    raise WadiError(
        f"student.timesteps is {list(timesteps)}. No scheduler of diffusers generates at these in a plain call: they must be "
        f"{rule}. The nearest are {near}."
    )


def check_timesteps(timesteps: Any, source: str) -> tuple[int, ...]:
    """Return the ``timesteps`` of a student that a file holds; ``source`` names the file in the message.

    Raises:
        WadiError: if they are something else than one to eight falling whole numbers.
    """
    whole = isinstance(timesteps, (list, tuple)) and all(type(t) is int and 1 <= t <= LONGEST for t in timesteps)
    if not whole or not 1 <= len(timesteps) <= MOST_STEPS or any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise WadiError(
            f"{source} has the timesteps {short_repr(timesteps)}. They must be a list of one to {MOST_STEPS} whole numbers, "
            "each below the one before. Restore the file as it was written."
        )
    return tuple(timesteps)


def _lcm_candidates(scheduler: Any, timesteps: Sequence[int]) -> Iterator[Any]:
    """Yield `LCMScheduler` objects whose first timestep is the first of ``timesteps``.

    With ``n`` original steps of ``k`` timesteps each, ``n k = t_0 + 1``, step ``i`` of ``N`` is at ``(n - i n // N) k - 1``.
    """
    from diffusers import LCMScheduler

    length, count = timesteps[0] + 1, len(timesteps)
    for k in (divisor for divisor in range(1, length // count + 1) if length % divisor == 0):
        n = length // k
        if [(n - i * n // count) * k - 1 for i in range(count)] == list(timesteps):
            yield LCMScheduler(
                num_train_timesteps=length,
                trained_betas=torch.as_tensor(scheduler.betas)[:length].tolist(),
                original_inference_steps=n,
                prediction_type=scheduler.config.get("prediction_type", "epsilon"),
                timestep_scaling=TIMESTEP_SCALING,
            )


def _flow_candidates(scheduler: Any, timesteps: Sequence[int]) -> Iterator[Any]:
    """Yield `FlowMatchLCMScheduler` objects: from ``T`` down in even steps, or in a constant ratio from any timestep.

    ``shift_terminal`` stretches the sigmas so that the last is as given, whether the pipeline passes sigmas or not.
    """
    from diffusers import FlowMatchLCMScheduler

    total = int(scheduler.config.num_train_timesteps)
    first, last = timesteps[0] / total, timesteps[-1] / total
    if first == 1:
        yield FlowMatchLCMScheduler(num_train_timesteps=total, shift_terminal=last)
    geometric: Any = FlowMatchLCMScheduler(num_train_timesteps=total, use_exponential_sigmas=True)
    geometric.register_to_config(sigma_min=last, sigma_max=first)
    yield geometric


def _is_at(scheduler: Any, timesteps: Sequence[int]) -> bool:
    """Return whether ``scheduler`` generates at ``timesteps`` in any pipeline's call. The scheduler's steps are set."""
    count = len(timesteps)
    calls: list[dict[str, Any]] = [{"num_inference_steps": count}]
    if is_flow(scheduler):  # the call of some pipelines passes these sigmas
        calls.insert(0, {"sigmas": [1 - i * (1 - 1 / count) / (count - 1) for i in range(count)]})
    for call in calls:
        scheduler.set_timesteps(**call)
        if any(abs(float(t) - timestep) >= 0.01 for t, timestep in zip(scheduler.timesteps, timesteps, strict=True)):
            return False
    return True


def is_few_step(scheduler: Any) -> bool:
    """Return whether ``scheduler`` is that of a student of several steps."""
    return type(scheduler).__name__ in ("LCMScheduler", "FlowMatchLCMScheduler")


def only_timestep_of(scheduler: Any, purpose: str) -> int:
    """Return ``t*`` of a student of one step; see `timestep_of`.

    Raises:
        WadiError: if it is a student of several steps. ``purpose`` says what needs one step, such as ``DreamBooth``.
    """
    if is_few_step(scheduler):
        raise WadiError(
            f"The student generates in several steps (its scheduler is {type(scheduler).__name__}). {purpose} supports "
            "students of one step: give one of those, or the teacher."
        )
    return timestep_of(scheduler)


def timestep_of(scheduler: Any) -> int:
    """Return ``t*``, at which a pipeline with this ``scheduler`` takes its one step: the inverse of `one_step_scheduler`.

    For any other scheduler this is the last timestep of its schedule, where a single step starts by default.
    """
    stored = stored_timestep(scheduler.config)
    return Process.from_scheduler(scheduler).last_timestep if stored is None else stored


def stored_timestep(config: Mapping[str, Any]) -> int | None:
    """Return the ``t*`` that the config of a student's scheduler holds, or None if the config does not hold one.

    A flow student that generates at the last timestep has the scheduler of a teacher, so the result is None for it too.
    """
    total = int(config["num_train_timesteps"])
    if config.get("sigma_max") is not None:
        return round(config["sigma_max"] * total)
    return None if config.get("trained_betas") is None else total - 1


def _ddim_step(scheduler: Any, timestep: int) -> Any:
    """Return DDIM over the teacher's betas up to ``timestep``.

    With trailing spacing its first step starts at ``timestep``; with ``set_alpha_to_one`` its last ends at ``x0``.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=scheduler.betas[: timestep + 1].tolist(),
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,  # trailing spacing ignores it, but diffusers warns about any other value
    )


def _flow_step(config: Any, timestep: int) -> Any:
    """Return Euler from ``sigma = timestep / T`` to 0.

    By default, a single step of this class starts at ``sigma = 1``. With exponential spacing it starts at the ``sigma_max`` of
    its config. The constructor has no such argument, so diffusers logs a message when it reads the saved config.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = int(config.num_train_timesteps)
    if timestep == steps:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
    euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, use_exponential_sigmas=True)
    euler.register_to_config(sigma_min=timestep / steps, sigma_max=timestep / steps)
    return euler


def check_not_distilled(pipeline: Any, network: Any) -> None:
    """Raise `WadiError` if the scheduler or config of a pipeline shows that it was distilled to a few steps."""
    scheduler, reason = pipeline.scheduler, None
    name = type(scheduler).__name__
    if name in DISTILLED:
        reason = f"its scheduler is {name}"
    elif network.config.get("time_cond_proj_dim") is not None:
        reason = "its network takes the guidance scale as an input (time_cond_proj_dim), like a latent consistency model"
    elif scheduler.config.get("trained_betas") is not None and scheduler.config.get("timestep_spacing") == "trailing":
        reason = "its scheduler's betas end early for one step, as `wadi export` writes them"
    elif scheduler.config.get("sigma_max") is not None and scheduler.config.get("sigma_min") == scheduler.config.sigma_max:
        reason = "its scheduler has a single sigma, as `wadi export` writes it"
    elif pipeline.config.get("is_distilled"):
        reason = "its model_index.json has is_distilled: true"
    if reason:
        raise WadiError(
            f"The teacher is itself a distilled model for few steps: {reason}. Give the multi-step model that it was distilled "
            "from as --teacher: only that one has a score at every timestep."
        )
