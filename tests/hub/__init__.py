"""A Hub on loopback for tests: `server.HubServer`, its `faults`, and fixtures in `conftest`."""
