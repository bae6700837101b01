"""The layers under ``torch.compile``: one graph, same numbers."""

import pytest
import torch
from lorad_toys import adapted, gradients, inputs


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_one_graph_with_the_same_output_and_gradients(recompute, autocast):
    """``aot_eager`` traces forward and backward as the default backend does and leaves out code generation."""
    model, x = adapted(recompute=recompute), inputs()

    def run(f):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = f(x)
        y.float().square().sum().backward()
        return y, gradients(model)

    torch.compiler.reset()
    due, got = run(model), run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if autocast else {}
    torch.testing.assert_close(got, due, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.slow
def test_generated_code():
    model, x = adapted(), inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    due = model(x)
    due.square().sum().backward()
    plain = gradients(model)
    model.zero_grad()
    got = compiled(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, due)
    torch.testing.assert_close(gradients(model), plain)
