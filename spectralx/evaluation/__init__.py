"""Scoring of models: confusion matrices, figures over seeds, tables and reports."""
