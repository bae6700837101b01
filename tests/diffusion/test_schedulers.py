"""A student's scheduler, and the timestep that is read back from it."""

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from wadi.diffusion.schedulers import make_scheduler, one_step_scheduler, stored_timestep, timestep_of
from wadi.errors import WadiError

TEACHERS = [DDIMScheduler(), DDIMScheduler(num_train_timesteps=500), FlowMatchEulerDiscreteScheduler()]


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: f"{type(teacher).__name__}-{len(teacher)}")
def test_a_students_timestep_is_read_back_from_its_scheduler(teacher):
    last = timestep_of(teacher)
    for timestep in (1, 333, last):
        student = one_step_scheduler(teacher, timestep)
        assert timestep_of(student) == timestep
        assert timestep_of(make_scheduler(dict(student.config, _class_name=type(student).__name__))) == timestep


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: f"{type(teacher).__name__}-{len(teacher)}")
def test_a_teachers_scheduler_holds_no_timestep_and_one_step_starts_at_its_last(teacher):
    flow = isinstance(teacher, FlowMatchEulerDiscreteScheduler)
    assert stored_timestep(teacher.config) is None
    assert timestep_of(teacher) == len(teacher) - (not flow)


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: f"{type(teacher).__name__}-{len(teacher)}")
def test_a_timestep_outside_the_schedule(teacher):
    for timestep in (-1, 0, timestep_of(teacher) + 1):
        with pytest.raises(WadiError) as error:
            one_step_scheduler(teacher, timestep)
        assert f"timestep {timestep}," in str(error.value)
