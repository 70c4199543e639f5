"""Fine-tuning on GLUE's tasks by `model.fit`: runs, suites of them, comparisons, evaluation."""
