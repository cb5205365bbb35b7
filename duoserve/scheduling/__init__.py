"""What moves when: plans of pure parts, and the scheduler that carries them out."""
