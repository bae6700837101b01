import pytest
import small_pipelines


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: a small pipeline of a family, saved to disk once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "pipeline"
            small_pipelines.make(name, folders[name].parent / "parts").save_pretrained(folders[name])
        return folders[name]

    return folder
