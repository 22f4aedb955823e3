"""The configuration of the nbgrader course in this folder."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
# nbgrader calls alembic, which stands beside this Python, by its bare name.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from grading.execute import IsolatedExecute
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbconvert.preprocessors.sanitize import SanitizeHTML
from nbgrader.preprocessors import (AssignLatePenalties, CheckCellMetadata, GetGrades, LimitOutput,
                                    SaveAutoGrades)

c = get_config()  # noqa: F821  (nbgrader defines it)
c.CourseDirectory.course_id = "lora"
c.CourseDirectory.root = str(HERE)
c.CourseDirectory.db_url = f"sqlite:///{HERE / 'gradebook.db'}?timeout=60"

# The learner's cells run in a sandbox, the tests outside of it: see grading/execute.py.
c.Autograde.autograde_preprocessors = [
    IsolatedExecute, LimitOutput, SaveAutoGrades, AssignLatePenalties, CheckCellMetadata]
c.IsolatedExecute.isolated = os.environ.get("ISOLATION") != "off"

# A page of feedback shows what the learner wrote, and runs nothing of it.
c.GenerateFeedback.preprocessors = [GetGrades, CSSHTMLHeaderPreprocessor, SanitizeHTML]
c.SanitizeHTML.enabled = True
