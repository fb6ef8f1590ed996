"""Two models compared on one question, place by place; nothing here goes through the tables that it checks."""
