//! What the screen shows, and what keys do.
//!
//! Owns [`App`], which knows no terminal: it takes events, says what is [wished](Wish), and draws on whatever frame it is given. Invariant: a row that is selected stays selected, wherever
//! the order puts it, until another one is or it is not shown any more.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use ratatui::{
    Frame,
    crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table, TableState},
};
use trapline_record::figures::{Module, Order, Snapshot};

use super::{
    batch::{heading, per_second},
    model::{Field, Row, View},
};
use crate::{color, record::short, report::duration};

/// How long a selection is recorded.
const RECORDED: Duration = Duration::from_secs(10);

/// What somebody wants that the screen cannot do by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// No more.
    Leave,
    /// The recorder is to do something.
    Order(Order),
}

/// What keys are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Rows,
    Search,
    Help,
}

/// See the module's text.
pub(super) struct App {
    view: View,
    mode: Mode,
    modules: Vec<Arc<Module>>,
    now: Snapshot,
    before: Snapshot,
    rows: Vec<Row>,
    table: TableState,
    selected: Option<(String, String, u64)>,
    message: String,
    recording: Option<Instant>,
    is_paused: bool,
    has_colors: bool,
}

/// The keys, for the overlay.
const HELP: [(&str, &str); 12] = [
    ("arrows PgUp PgDn Home End", "select a row"),
    ("c C", "sort by calls a second, by all calls"),
    ("t s p n", "sort by total, self, p99, name"),
    ("/", "show names with a text in them; Esc shows all"),
    ("m", "fold functions into their modules, or unfold"),
    ("Space", "stop counting what is selected, or go on"),
    ("r", "record ten seconds of what is selected"),
    ("P", "hold the picture, or let it go on"),
    ("?", "this help"),
    ("q Ctrl-C", "leave; a launched program gets SIGTERM"),
    ("", "calls/s is what came since the last look,"),
    ("", "all else since the beginning"),
];

impl App {
    pub(super) fn new(view: View) -> Self {
        Self {
            view,
            mode: Mode::Rows,
            modules: Vec::new(),
            now: Snapshot::default(),
            before: Snapshot::default(),
            rows: Vec::new(),
            table: TableState::default(),
            selected: None,
            message: String::new(),
            recording: None,
            is_paused: false,
            has_colors: color::has_output(),
        }
    }

    /// What the last look has found.
    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.now
    }

    /// All rows.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Takes what a look has found.
    pub(super) fn look(&mut self, modules: Vec<Arc<Module>>, now: Snapshot) {
        if !self.is_paused {
            self.modules = modules;
            self.before = std::mem::replace(&mut self.now, now);
            self.arrange();
        }
    }

    /// Shows what became of an order.
    pub(super) fn tell(&mut self, news: String) {
        self.message = news;
    }

    /// What is to be ordered because time has passed.
    pub(super) fn due_order(&mut self) -> Option<Order> {
        self.recording.take_if(|since| since.elapsed() >= RECORDED).map(|_| Order::StopRecording)
    }

    /// Takes a key.
    pub(super) fn take(&mut self, event: &Event, output: &Path) -> Option<Wish> {
        let Event::Key(key) = event else { return None };
        if key.kind == KeyEventKind::Release {
            return None;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Some(Wish::Leave);
        }
        if key.modifiers.contains(KeyModifiers::ALT) {
            // What a terminal makes of Escape and a key that come together.
            let _ = self.take(&Event::Key(KeyEvent::from(KeyCode::Esc)), output);
            let plain = KeyEvent { modifiers: key.modifiers - KeyModifiers::ALT, ..*key };
            return self.take(&Event::Key(plain), output);
        }
        match self.mode {
            Mode::Help => self.mode = Mode::Rows,
            Mode::Search => self.take_for_search(key),
            Mode::Rows => return self.take_for_rows(key, output),
        }
        None
    }

    fn take_for_search(&mut self, key: &KeyEvent) {
        match key.code {
            KeyCode::Enter => self.mode = Mode::Rows,
            KeyCode::Esc => {
                self.view.search.clear();
                self.mode = Mode::Rows;
            }
            KeyCode::Backspace => drop(self.view.search.pop()),
            KeyCode::Char(letter) => self.view.search.push(letter),
            _ => {}
        }
        self.arrange();
    }

    fn take_for_rows(&mut self, key: &KeyEvent, output: &Path) -> Option<Wish> {
        const PAGE: isize = 10;
        self.message.clear();
        match key.code {
            KeyCode::Char('q') => return Some(Wish::Leave),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.mode = Mode::Help,
            KeyCode::Char('/') => self.mode = Mode::Search,
            KeyCode::Esc => self.view.search.clear(),
            KeyCode::Char('m') => self.view.is_folded = !self.view.is_folded,
            KeyCode::Char('P') => self.is_paused = !self.is_paused,
            KeyCode::Up | KeyCode::Char('k') => self.select(-1),
            KeyCode::Down | KeyCode::Char('j') => self.select(1),
            KeyCode::PageUp => self.select(-PAGE),
            KeyCode::PageDown => self.select(PAGE),
            KeyCode::Home => self.select(isize::MIN),
            KeyCode::End => self.select(isize::MAX),
            KeyCode::Char(' ') => return self.switch(),
            KeyCode::Char('r') => return self.record(output),
            KeyCode::Char(letter) => match letter {
                'c' => self.view.sort = Field::Rate,
                'C' => self.view.sort = Field::Calls,
                't' => self.view.sort = Field::Total,
                's' => self.view.sort = Field::Own,
                'p' => self.view.sort = Field::P99,
                'n' => self.view.sort = Field::Name,
                _ => {}
            },
            _ => {}
        }
        self.arrange();
        None
    }

    /// Makes up the rows anew.
    fn arrange(&mut self) {
        self.rows = self.view.rows(&self.modules, &self.now, &self.before);
        let is_it = |row: &Row| self.selected.as_ref().is_some_and(|selected| *selected == key_of(row));
        let at = self.rows.iter().position(is_it);
        self.table.select(at);
    }

    /// Selects the row that is so many further down.
    fn select(&mut self, distance: isize) {
        let Some(last) = self.rows.len().checked_sub(1) else { return };
        let at = self
            .table
            .selected()
            .map_or(if distance > 0 { 0 } else { last }, |at| at.saturating_add_signed(distance).min(last));
        let at = match distance {
            isize::MIN => 0,
            isize::MAX => last,
            _ => at,
        };
        self.selected = self.rows.get(at).map(key_of);
    }

    fn selected_row(&mut self) -> Option<&Row> {
        let row = self.table.selected().and_then(|at| self.rows.get(at));
        if row.is_none() {
            "select a row first, by the arrow keys".clone_into(&mut self.message);
        }
        row
    }

    fn switch(&mut self) -> Option<Wish> {
        let row = self.selected_row()?;
        let (sites, is_on) = (row.sites.clone(), row.is_off);
        for site in &sites {
            if is_on {
                self.view.off.remove(site)
            } else {
                self.view.off.insert(*site)
            };
        }
        self.arrange();
        Some(Wish::Order(Order::Switch { sites, is_on }))
    }

    fn record(&mut self, output: &Path) -> Option<Wish> {
        if self.recording.is_some() {
            "a recording goes on already".clone_into(&mut self.message);
            return None;
        }
        let row = self.selected_row()?;
        let (sites, name) = (row.sites.clone(), row.name.clone());
        self.recording = Some(Instant::now());
        self.message = format!("recording {name} for ten seconds, into {}", output.display());
        let given = BTreeMap::from([("selection".to_owned(), name)]);
        Some(Wish::Order(Order::Record { output: output.to_owned(), sites, given }))
    }

    /// Draws all of it.
    pub(super) fn draw(&mut self, frame: &mut Frame) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.headline()), head);
        self.draw_rows(frame, body);
        frame.render_widget(Paragraph::new(self.footline()), foot);
        if self.mode == Mode::Help {
            draw_help(frame);
        }
    }

    fn headline(&self) -> Line<'static> {
        let paused = if self.is_paused { " (held)" } else { "" };
        let text = format!("trapline top: {}{paused}", heading(&self.now));
        Line::styled(text, Style::new().add_modifier(Modifier::BOLD))
    }

    fn footline(&self) -> Line<'static> {
        match self.mode {
            Mode::Search => Line::raw(format!("/{}_  Enter keeps it, Esc shows all", self.view.search)),
            _ if !self.message.is_empty() => Line::styled(self.message.clone(), self.warning()),
            _ if !self.view.search.is_empty() => Line::raw(format!("names with `{}`; Esc shows all", self.view.search)),
            _ => Line::raw("q leave  ? help  / search  c t s p n sort  m modules  Space off/on  r record"),
        }
    }

    fn draw_rows(&mut self, frame: &mut Frame, area: Rect) {
        let sorted = |field: Field, name: &'static str| {
            let style = Style::new().add_modifier(Modifier::REVERSED);
            Cell::new(name).style(if self.view.sort == field { style.add_modifier(Modifier::BOLD) } else { style })
        };
        let header = TableRow::new([
            sorted(Field::Rate, " calls/s"),
            sorted(Field::Calls, "   calls"),
            sorted(Field::Total, "    total"),
            sorted(Field::Own, "     self"),
            sorted(Field::P99, "      p99"),
            sorted(Field::Name, "function"),
        ])
        .style(Style::new().add_modifier(Modifier::REVERSED));
        let warning = self.warning();
        let rows = self.rows.iter().map(|row| {
            let [total, p99] = [row.total_ns, row.p99_ns].map(|ns| ns.map_or_else(|| "-".to_owned(), duration));
            let off = if row.is_off { "off: " } else { "" };
            let module = if row.module.is_empty() { String::new() } else { format!(" [{}]", row.module) };
            let cells = [
                format!("{:>8}", per_second(row.rate)),
                format!("{:>8}", short(row.calls)),
                format!("{total:>9}"),
                format!("{:>9}", duration(row.self_ns)),
                format!("{p99:>9}"),
                format!("{off}{}{module}", row.name),
            ];
            TableRow::new(cells).style(if row.is_off { warning } else { Style::new() })
        });
        let widths = [8, 8, 9, 9, 9].map(Constraint::Length).into_iter().chain([Constraint::Min(10)]);
        let table =
            Table::new(rows, widths).header(header).row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_stateful_widget(table, area, &mut self.table);
    }

    fn warning(&self) -> Style {
        if self.has_colors { Style::new().fg(Color::Yellow) } else { Style::new() }
    }
}

/// What a row is known by from one look to the next.
fn key_of(row: &Row) -> (String, String, u64) {
    (row.path.clone(), row.name.clone(), row.address)
}

fn draw_help(frame: &mut Frame) {
    let lines = HELP.map(|(keys, what)| Line::raw(format!("{keys:>26}  {what}")));
    let area = frame.area();
    let width = 80.min(area.width);
    let height = u16::try_from(HELP.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let place = Rect::new((area.width - width) / 2, (area.height - height) / 2, width, height);
    frame.render_widget(Clear, place);
    frame
        .render_widget(Paragraph::new(lines.to_vec()).block(Block::bordered().title("keys; any key goes back")), place);
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};
    use trapline_record::figures::{Figure, Function};

    use super::*;

    fn app() -> App {
        let mut app = App::new(View::new(Field::Calls));
        let functions =
            ["main", "work", "other"].map(|name| Function { name: name.to_owned(), address: name.len() as u64 });
        let module = Module { path: "/bin/prog".to_owned(), first_site: 0, functions: functions.to_vec() };
        app.look(vec![Arc::new(module)], snapshot(1, [1, 30, 20]));
        app
    }

    fn snapshot(seconds: u64, calls: [u64; 3]) -> Snapshot {
        let figure = |(site, calls)| Figure { site, calls, open: 0, total_ns: 1500, self_ns: 5, p99_ns: Some(7) };
        let figures = (0..).zip(calls).map(figure).collect();
        Snapshot { figures, elapsed_ns: seconds * 1_000_000_000, processes: 1, threads: 2, uncounted: 0 }
    }

    fn press(app: &mut App, keys: &str) -> Option<Wish> {
        let code = |letter| match letter {
            '>' => KeyCode::Down,
            '<' => KeyCode::Up,
            '$' => KeyCode::Enter,
            '!' => KeyCode::Esc,
            letter => KeyCode::Char(letter),
        };
        let events = keys.chars().map(|letter| Event::Key(KeyEvent::from(code(letter))));
        events.map(|event| app.take(&event, Path::new("x.data"))).last().flatten()
    }

    fn drawn(app: &mut App, (width, height): (u16, u16)) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| app.draw(frame)).expect("a picture");
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    #[test]
    fn rows_are_drawn_in_order_and_fit_a_terminal_of_80_columns() {
        let mut app = app();
        app.look(app.modules.clone(), snapshot(3, [1, 50, 60]));
        let lines = drawn(&mut app, (80, 24));
        assert_eq!(lines[0], "trapline top: 3.000s after the beginning, 1 process, 2 threads");
        assert_eq!(lines[1], " calls/s    calls     total      self       p99 function");
        assert_eq!(lines[2], "      20       60    1.50us       5ns       7ns other [prog]");
        assert!(lines[3].ends_with("work [prog]") && lines[4].ends_with("main [prog]"));
        assert!(lines[23].starts_with("q leave"));
        for size in [(1, 1), (20, 3), (300, 100)] {
            drawn(&mut app, size);
        }
    }

    #[test]
    fn a_selected_row_stays_selected_where_another_order_puts_it() {
        let mut app = app();
        assert_eq!(press(&mut app, " "), None, "nothing is selected");
        press(&mut app, ">");
        let off = press(&mut app, " ");
        assert_eq!(off, Some(Wish::Order(Order::Switch { sites: vec![1], is_on: false })));
        app.look(app.modules.clone(), snapshot(2, [1, 30, 99]));
        assert!(drawn(&mut app, (80, 24))[3].ends_with("off: work [prog]"));
        assert_eq!(press(&mut app, " "), Some(Wish::Order(Order::Switch { sites: vec![1], is_on: true })));
        assert!(!drawn(&mut app, (80, 24)).concat().contains("off: "));
        press(&mut app, "<");
        let recorded = press(&mut app, "r");
        assert!(matches!(recorded, Some(Wish::Order(Order::Record { sites, .. })) if sites == [2]));
        assert_eq!(press(&mut app, "r"), None, "one at a time");
        assert_eq!(app.due_order(), None, "ten seconds have not passed");
    }

    #[test]
    fn a_search_takes_letters_that_are_keys_elsewhere() {
        let mut app = app();
        press(&mut app, "/or");
        let lines = drawn(&mut app, (80, 24));
        assert!(lines[2].ends_with("work [prog]") && lines[3].is_empty() && lines[23].starts_with("/or_"));
        press(&mut app, "$");
        assert_eq!(press(&mut app, "q"), Some(Wish::Leave));
        press(&mut app, "!");
        assert!(drawn(&mut app, (80, 24))[4].ends_with("main [prog]"));
        press(&mut app, "/or$");
        app.take(&Event::Key(KeyEvent::new(KeyCode::Char('m'), KeyModifiers::ALT)), Path::new("x.data"));
        assert!(drawn(&mut app, (80, 24))[2].ends_with("- prog"));
    }

    #[test]
    fn help_lies_over_the_rows_until_a_key_and_a_held_picture_stays() {
        let mut app = app();
        press(&mut app, "?");
        assert!(drawn(&mut app, (80, 24)).concat().contains("any key goes back"));
        assert_eq!(press(&mut app, "q"), None);
        assert!(!drawn(&mut app, (80, 24)).concat().contains("any key goes back"));
        press(&mut app, "P");
        let before = drawn(&mut app, (80, 24));
        app.look(app.modules.clone(), snapshot(2, [1000, 30, 20]));
        assert_eq!(drawn(&mut app, (80, 24)), before);
        press(&mut app, "P");
        app.look(app.modules.clone(), snapshot(2, [1000, 30, 20]));
        assert_ne!(drawn(&mut app, (80, 24)), before);
    }
}
