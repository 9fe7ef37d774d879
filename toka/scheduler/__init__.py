"""The scheduler: decides what each step computes. `scheduler.Scheduler` is its only public face; no torch here."""
