"""Dashboards for Grafana, as code: `boards` says what they show, `grafana` how that is written down."""
