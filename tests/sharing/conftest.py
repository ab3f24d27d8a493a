from tests.hub.conftest import hub, run_client  # noqa: F401
