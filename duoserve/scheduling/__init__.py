"""What moves when: plans of pure parts, the scheduler that carries them out, and the replay of both on a trace."""
