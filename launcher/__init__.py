"""The parent process of a run: plans, supervises and diagnoses workers. Never imports torch."""
