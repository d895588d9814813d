"""The teacher: who answers the questions from their documents.

`generate_teacher_answers` is the public function; the engines are in `engines`.
"""

from scaledown.data.teacher.api import generate_teacher_answers

__all__ = ["generate_teacher_answers"]
