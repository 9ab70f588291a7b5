"""What the services share: wire, configuration, errors, pages, transfer, model, engine."""

__version__ = "0.1.0"
