"""The `headrace` command: one file per subcommand; `app` puts them together."""
