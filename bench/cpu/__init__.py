"""The CPU bench: who takes part, what each reached, and its report."""
