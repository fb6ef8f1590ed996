"""An operation's backends side by side: time, memory, error, and the project's targets."""
