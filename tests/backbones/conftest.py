import pytest
import small_pipelines


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: a small pipeline of a family, saved to disk once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pipeline"
            small_pipelines.make(name, made[name].parent / "parts").save_pretrained(made[name])
        return made[name]

    return folder
