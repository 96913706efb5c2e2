"""What the notebooks show: tables, widgets, the report, checks of exercises."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dashboard": [
            "ROUND_COLUMNS",
            "dashboard_panels",
            "round_rows",
            "sample_rows",
        ],
        "execute": ["run_notebooks"],
        "exercises": ["check"],
        "export": ["ask_both", "merge_model", "model_card"],
        "notebooks": [
            "Table",
            "changed_parameters",
            "default_run_dir",
            "main_line",
            "numbered_notebooks",
            "open_notebook_run",
        ],
        "progress": ["exercises_line", "read_progress"],
        "report": ["choice_line", "summary_table", "write_report"],
        "upload": ["push"],
    },
)
