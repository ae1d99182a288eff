"""One benchmark a file: its prompts, settings and grader; execute.py runs generated programs."""
