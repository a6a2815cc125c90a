import pytest
import torch

from nexus_adapters.injection.schedule import schedule_position


@pytest.mark.parametrize("timesteps", [1000, 30])
def test_a_boundary_is_the_number_that_a_user_writes(timesteps):
    """`start <= p <= end` must hold at p = start and p = end."""
    for tenth in range(11):
        written = float(f"0.{tenth}") if tenth < 10 else 1.0
        assert schedule_position(timesteps - timesteps * tenth // 10, timesteps) == written
        as_tensor = torch.tensor([timesteps - timesteps * tenth // 10] * 2)
        assert schedule_position(as_tensor, timesteps) == written
