"""What the notebooks show: tables, widgets, the report, checks of exercises."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dashboard": [
            "ROUND_COLUMNS",
            "choice_line",
            "dashboard_panels",
            "round_rows",
            "sample_rows",
        ],
        "exercises.catalogue": ["check"],
        "notebooks": ["Table", "open_notebook_run"],
        "report": ["summary_table", "write_report"],
    },
)
